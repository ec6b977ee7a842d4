"""The annotated book, docs/index.html: it loses nothing of the sources, and a real browser finds nothing wrong."""
import base64
import html
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from io import BytesIO

import pytest
from conftest import only_ci
from matplotlib.image import imread

from docs import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLANTED = ('<img src="x.png"><a href="#nowhere">x</a><div style="width: 500px">x</div>'
           '<script>console.error("planted")</script>'
           '<section id="planted"><pre class="s">' + 200 * "x" + "</pre></section>")
ANCHOR = '<section class="r3" id="autograd.attention_plain"><div class="p"><h3>'
IN_THE_STICKY_COLUMN = '<section class="r3"><div class="p"><h3 id="autograd.attention_plain">'
HARNESS = """<iframe src="page.html" width="390" height="800"></iframe>
<iframe src="planted.html" width="390" height="800"></iframe>
<script>
onload = () => document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const window = frame.contentWindow, page = frame.contentDocument, all = what => [...page.querySelectorAll(what)];
  const of = x => x.closest("section")?.id ?? "top";
  window.scrollTo(0, page.getElementById("autograd.gradcheck").offsetTop);
  window.look();
  const seen = {
    bar: page.querySelector("nav span").textContent, links: page.links.length,
    loaded: [...window.performance.getEntriesByType("resource").map(x => x.name), ...all("[src]").map(x => x.src)],
    hidden: [], cut: [], small: []};
  for ([frame.width, frame.height] of [[390, 800], [1300, 1000]]) {
    const bar = page.querySelector("nav").getBoundingClientRect().bottom;
    for (const target of all("section[id], section u[id], section h3[id]")) {   // each is reached from further down
      const folded = target.closest("details");
      window.scrollTo(0, page.body.scrollHeight);
      if (folded) {
        folded.open = false;
        window.history.replaceState(null, "", "#" + target.id);     // the page's script unfolds it, not the browser
        window.unfold();
      } else
        target.scrollIntoView();
      const spot = target.closest("u, section").getBoundingClientRect();
      if (!spot.height || spot.top < bar - 1 || spot.top > frame.height - 50)
        seen.hidden.push(target.id);
    }
    all("details").forEach(x => x.open = true);
    const cells = frame.width > 1000 ? all(".s, .e, .f")     // a narrow screen scrolls code and examples
      : all(".e, .f").filter(x => !x.textContent.startsWith(">>>"));
    seen.cut.push(...cells.filter(x => x.scrollWidth > x.clientWidth).map(of));
    seen.small.push(...all("figure svg").filter(x => x.getBoundingClientRect().width < 340).map(of));
    seen[frame.width] = page.documentElement.scrollWidth;
  }
  return seen;
}));
</script>"""


@pytest.fixture(scope="module")
def text():
    return page.page()


@pytest.fixture(scope="module")
def planted(text):
    """The page's first chapters with defects."""
    assert ANCHOR in text
    one_chapter = re.sub('(?s)<section class="r1" id="nanollm">.*</main>', "</main>", text)
    return one_chapter.replace("</main>", PLANTED + "</main>").replace(ANCHOR, IN_THE_STICKY_COLUMN).replace(
        'id="DejaVuSans-48"', "").replace("folded.open = true", "").replace("width: 100%; height: auto", "width: 9%")


def links(text):
    """(all links, those that lead nowhere in the page, how many ids stand twice)"""
    ids = re.findall(r'<[^<>]* id="([^"]*)"', text)
    found = re.findall(r'<(?:a|use)\b[^<>]*href="([^"]*)"', text)
    return found, [link for link in found if link[0] != "#" or link[1:] not in ids], len(ids) - len(set(ids))


def test_every_link_leads_to_one_place(text, planted):
    found, nowhere, twice = links(text)
    assert len(found) > 500 and (nowhere, twice) == ([], 0)
    assert {"#nowhere", "#DejaVuSans-48"} <= set(links(planted)[1]) and links(text + '<p id="nanollm">')[2] == 1


@pytest.fixture(scope="module")
def seen(text, planted, tmp_path_factory):
    """What the browser reports about the page, and about the one with defects."""
    if BROWSER is None:
        pytest.skip("no chromium to look at the page with")
    folder = tmp_path_factory.mktemp("page")
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "planted.html").write_text(planted, encoding="utf-8")
    (folder / "harness.html").write_text(HARNESS, encoding="utf-8")
    flags = ("--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
             "--disable-component-update --disable-dev-shm-usage --hide-scrollbars --allow-file-access-from-files "
             "--enable-logging=stderr --dump-dom").split()
    run = subprocess.run([BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", (folder / "harness.html").as_uri()],
                         capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"HOME": str(folder)})
    good, bad = json.loads(html.unescape(re.search("<body>(.*)</body>", run.stdout, re.DOTALL)[1]))
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    good["console"] = [line for line in console if "planted.html" not in line]
    bad["console"] = [line for line in console if "planted.html" in line]
    return good, bad


@only_ci("three seconds")
def test_a_browser_finds_nothing_wrong(seen):
    good, _ = seen
    assert good.pop("links") > 500
    assert good == {"bar": "gradcheck", "loaded": [], "console": [], "hidden": [], "cut": [], "small": [], "390": 390,
                    "1300": 1300}


@only_ci("three seconds")
def test_a_browser_would_find_each_planted_defect(seen):
    _, bad = seen
    assert bad["390"] > 390
    assert {"autograd.attention_plain", "autograd.attention"} <= set(bad["hidden"])
    assert bad["cut"] == ["planted"] and bad["small"] and bad["loaded"]
    assert len(bad["console"]) == 1 and "planted" in bad["console"][0]


def test_every_figure_and_lesson_has_its_place(text):
    figures = {path.stem for path in (page.ROOT / "docs" / "figures").glob("*.svg")}
    lessons = {path.stem for path in (page.ROOT / "lessons").glob("[a-z]*.py")} - {"common"}
    assert set(page.FIGURES.values()) == figures and set(page.LESSONS) == lessons
    for anchor in {*page.FIGURES, *page.LESSONS.values(), *page.FOLDED, *page.FOLDED.values()}:
        assert text.count(f'id="{anchor}"') == 1, anchor
    assert text.count("<figure><svg id=") == len(figures) and text.count('class="lesson"') == len(lessons)
    assert text.count('class="fast"') == len(page.FOLDED)
    for picture in re.findall(r'href="data:image/png;base64,([^"]+)"', text):
        imread(BytesIO(base64.b64decode(picture)))


def text_of(markup):
    return html.unescape(re.sub("<[^>]*>", "", markup))


@pytest.mark.parametrize("file", page.FILES)
def test_no_line_and_no_word_of_a_file_is_lost(file):
    chapter = page.Chapter(file)
    shown = chapter.html([row.anchor for row in chapter.rows if row.level < 3])
    others = '<figure>.*?</figure>|<details class="lesson">.*?</details></details>|<summary>.*?</summary>'
    shown = re.sub(f"(?s){others}", "", shown)
    pairs = re.findall('<pre class="g">(.*?)</pre><pre class="s" tabindex="0">(.*?)</pre>', shown, re.DOTALL)
    code = {int(n): line for numbers, lines in pairs
            for n, line in zip(numbers.split(), text_of(lines).split("\n"), strict=True)}
    assert list(code) == sorted(code) and all(chapter.lines[n - 1] == line for n, line in code.items())
    assert {n for n, line in enumerate(chapter.lines, 1) if line} <= code.keys() | chapter.hidden

    rest = '<h[123].*?</h[123]>|<(span|a) class="at".*?</(span|a)>|(?s:<div class="c">.*?</section>)|<[^>]*>'
    words = re.findall("[a-z]{3,}", html.unescape(re.sub(rest, " ", shown)))
    wide = re.findall("[a-z]{3,}", text_of(" ".join(re.findall('(?s)<pre class="e".*?</pre>', shown))))
    said = [word for row in chapter.rows for word in re.findall("[a-z]{3,}", row.doc)]
    assert Counter(words) + Counter(wide) - Counter(["sum"] * 99) == Counter(said) - Counter(["sum"] * 99)


@pytest.mark.parametrize(("formula", "expected"), [
    ("x_{i+D/2}", "<i>x</i><sub><i>i</i>+<i>D</i>/2</sub>"),
    ("θ^(-2i/D)", "<i>θ</i><sup>−2<i>i</i>/<i>D</i></sup>"),
    ("x**(p-1)", "<i>x</i><sup><i>p</i>−1</sup>"),
    ("dw = doutᵀ @ x", "<i>dw</i> = <i>dout</i><sup><i>T</i></sup> @ <i>x</i>"),
    ("log sum_j exp(s_j) >= 1e-5", "log ∑<sub><i>j</i></sub> exp(<i>s</i><sub><i>j</i></sub>) ≥ 1e−5"),
    ("a'(x) < b's", "<i>a</i>′(<i>x</i>) &lt; <i>b</i>’s"),
    ("row_dot(a) = dx_block", "<code>row_dot</code>(<i>a</i>) = <i>dx</i><sub><i>block</i></sub>"),
])
def test_formulas(formula, expected):
    assert page.typeset(formula, {"out"}) == expected


def test_columns_stay_aligned_and_remarks_go_below(chapter):
    grid = chapter.formulas(["    dx_i = r dn_i        # a remark", "         = r · n_i"], set())
    assert re.sub("</?[iu]>|</?su[bp]>", "", grid) == (
        '<div class="f" style="grid-template-columns:auto auto 1fr">'
        '<div><div style="grid-column:1/2"><span>dxi</span></div>'
        '<div style="grid-column:2/-1"><span>= r dni</span></div><div class="n">a remark</div></div>'
        '<div><div style="grid-column:2/-1"><span>= r · ni</span></div></div></div>')


def test_a_list_of_names_keeps_its_two_columns(chapter):
    lines = ["    xp           NumPy or CuPy", "    sweep(f, n)  calls f with slices that cover range(n)",
             "    fuse         marks a formula that becomes one kernel"]
    assert 'class="n"' not in chapter.formulas(lines, set())
    assert 'class="n"' in chapter.formulas([*lines, "    a = b  is a formula with a remark"], set())


ONE = '''"""About it."""


@cached
def double(x):
    """out = 2 x, see `half`."""
    return f"{x!r:{'>'}3} and {double}"


def half(x, double=2):
    return other(double, half=x) or x.half or half(x)
'''


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(ONE)
    (tmp_path / "two.py").write_text("from one import half\n\nfour = half(8)\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "FILES", ("one.py", "two.py"))
    return page.Chapter("one.py")


def test_a_name_links_to_what_it_means(chapter):
    assert "double" not in re.findall('<a href="#one.(.*?)">', chapter.code[11])        # its parameter
    assert chapter.code[11].count('<a href="#one.half">') == 1                          # no keyword, no attribute
    assert '<s>f"{x!r:{\'&gt;\'}3} and {double}"</s>' in chapter.code[7]
    assert [row.line for row in chapter.rows] == [1, 4, 10]
    assert '<a href="#one.half"><code>half</code></a>' in chapter.prose(chapter.rows[1])[0]
    assert page.Chapter("two.py").code[3] == '<u id="two.four">four</u> = <a href="#one.half">half</a>(8)'


HELPED = '''def one():
    """Uses what comes after it."""
    return _after()


_after = int


# about before
@cached
def _before():
    return 1


def two():
    """Uses what comes before it."""
    return _before()


# ------------ a part

_unused = 2
'''


def test_a_helper_is_in_the_row_of_the_definition_that_uses_it(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(HELPED)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    rows = page.Chapter("one.py").rows
    assert [(row.line, row.title) for row in rows] == [(1, "one.py"), (1, "one"), (9, "two"), (20, "a part")]


def test_check_fails_for_an_old_page_and_writing_fixes_it(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for file in (*page.FILES, "docs/page.html", "docs/page.css", "docs/page.js"):
        shutil.copy(page.ROOT / file, tmp_path / file)
    for folder in "docs/figures", "lessons":
        (tmp_path / folder).symlink_to(page.ROOT / folder)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "FILES", ("data.py",))
    for arguments, fails in (["--check"], True), ([], False), (["--check"], False):
        monkeypatch.setattr(page.sys, "argv", ["page.py", *arguments])
        if fails:
            with pytest.raises(SystemExit, match=r"run python docs/page\.py"):
                page.main()
        else:
            page.main()
    (tmp_path / "data.py").write_text((tmp_path / "data.py").read_text() + "# more\n")
    with pytest.raises(SystemExit):
        page.main()
