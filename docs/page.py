"""Write the core as an annotated book, docs/index.html, one page that needs no network:  python docs/page.py [--check]

Everything comes from the sources: a module's docstring opens a chapter, a rule (`# ------ the engine`) opens a section,
and each definition's docstring is shown next to its code. The figures come from docs/figures/, the mistakes from
lessons/, the first screen from docs/page.html. `--check` writes nothing and fails if the page is old.

In a docstring, unindented lines are prose and the browser wraps them. Indented lines are formulas: parts that
are aligned in two lines, after two spaces or before an =, stay aligned, and a remark at the end of a line moves below
it. Diagrams, which contain arrows or frames, and examples (>>>) are copied as they are.
"""
import ast
import inspect
import io
import keyword
import re
import sys
import token
import tokenize
from collections import namedtuple
from html import escape as escape_all
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # nanollm is run from its folder
from storage.files import whole  # noqa: E402

FILES = "autograd.py", "nanollm.py", "data.py", "train.py"
NO_BREAK, GAP = "\xa0", '<span class="gap"> </span>'
Row = namedtuple("Row", "line level title anchor doc names")    # names: the parameters, variables of its formulas

FIGURES = {"autograd": "graph", "autograd.gradcheck": "step_size", "autograd.linear": "time",
           "autograd.rope": "rope", "autograd.attention_plain": "attention", "autograd.recompute": "memory",
           "nanollm.NanoLLM": "gradient_flow", "nanollm.NanoLLM.generate": "sampling", "train.train": "training"}
LESSONS = {"gradcheck_of_ones": "autograd.gradcheck", "gradcheck_of_small_squares": "autograd.gradcheck",
           "tied_weights_counted_once": "autograd.embedding", "rope_pairing": "autograd.rope",
           "no_causal_mask": "autograd.attention_plain", "dropout_on_the_logit": "autograd.dropout",
           "accuracy_of_one_column": "autograd.cross_entropy", "unequal_batches": "train.train",
           "byte_pairs_in_the_wrong_order": "data.TokenDataset.from_text",
           "validation_on_training_text": "data.TokenDataset.split",
           "float16_without_loss_scaling": "train.adapt_loss_scale"}
FOLDED = {"autograd.rmsnorm": "autograd.rmsnorm", "autograd._by_queries": "autograd.attention",
          "autograd.logit_blocks": "autograd.linear_cross_entropy"}     # the first and last row of a blocked form
COLOURS = {"#24292f": "ink", "#6e7781": "soft", "#dde1e5": "line", "#ced4da": "line", "#fcfcfa": "paper",
           "white": "paper", "#0072b2": "blue", "#d55e00": "red", "#009e73": "green", "#cc79a7": "pink"}


def escape(text):
    return escape_all(text, quote=False)


# ---------------------------------------------------------------- mathematics

RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀᵗᵖ", "0123456789+-Ttp", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
SIGNS = {"-": "−", "*": "∗", "'": "′", "'s": "’s", "->": "→", ">=": "≥", "<=": "≤", "sum": "∑",
         "&": "&amp;", "<": "&lt;", ">": "&gt;"}
UPRIGHT = {"sin", "cos", "exp", "log", "sum", "mean", "max"}
MATH = re.compile(
    r"(?P<word>[a-z]{2,}_[a-z]{3,})"                                            # row_dot, dx_block
    r"|(?:\^|\*\*)(?:\((?P<power>[^()]*)\)|(?P<letter>[^\W_]))"                  # θ^(-2i/D), x**p
    r"|_(?:\{(?P<index>[^}]*)\}|(?P<letters>[A-Za-zα-ω\d]+))"                   # x_{i+D/2}, x_i
    f"|(?P<raised>[{''.join(RAISED)}]+)|(?P<lowered>[{''.join(LOWERED)}]+)"     # x², β₁
    r"|(?P<number>\d[\d.]*(?:e-?\d+)?)|(?P<sign>->|>=|<=|'s\b|[-*'&<>]|sum(?=_\w\b))|(?P<name>[A-Za-zα-ω]+\u0302?)")

# In prose, these words are always mathematics, and so is a word next to an operator.
IS_MATH = re.compile(r"-\w.*|[b-zB-HJ-Zα-ω]|d[a-np-z]|d(?:out|L\w+)\b.*|\w'?[(\[].*|.*\b\w[*/]\w\b.*"
                     f"|.*[_^√∂½|=·±≈α-ω{''.join(RAISED)}{''.join(LOWERED)}].*")
OPERATORS = {*"=+-*/@·≈←<>≤≥×…", "//", "->", ">=", "<=", "+=", "=="}
KEPT = re.compile(                      # what is not running text
    r"`(?P<quoted>[^`]+)`"
    r"|(?P<source>\([^()]*\b(?:19|20)\d\d\b[^()]*\))"
    r"|(?P<shape>\(\.\.\.\)|\((?:\.\.\.|\*?[A-Z]|\*?\w+\.\w+|[a-z])(?:,\)|(?:, ?(?:\.\.\.|\d?[A-Z]|[a-z]|rest))+\)))"
    r"|(?P<code>python \S+(?: --[\w-]+| [A-Z]{2,})*|(?<!\w)--\w[\w-]*|\b[a-z]\w+=[A-Z\d]\w*|\b\w+Error\b"
    r"|\b(?:None|True|False)\b|\b[A-Za-z]\w+(?:/\w+)*(?:\.[A-Za-z_]\w+)+|\b[a-z]\w+\[[^\]]*\]"
    r"|\b[a-z]\w+\((?:[^()]|\([^()]*\))*\)|\b\w+_\w+\b)")


def is_variable(word, names):
    """Single letters and `names`, also with a d before them."""
    return word not in UPRIGHT and any(len(x) == 1 or x in names for x in (word, word.removeprefix("d")))


def typeset(text, names):
    """HTML of a formula: powers raised, indices lowered, variables in italics."""
    def one(found):
        kind, part = found.lastgroup, found[found.lastgroup]
        if kind in ("power", "letter", "raised"):
            return f"<sup>{typeset(''.join(RAISED.get(x, x) for x in part), names)}</sup>"
        if kind in ("index", "letters", "lowered"):
            return f"<sub>{typeset(''.join(LOWERED.get(x, x) for x in part), {*names, part})}</sub>"
        if kind == "number":
            return part.replace("-", "−")
        if kind == "word":
            name, index = part.split("_")
            index = f"<sub>{typeset(index, {*names, index})}</sub>"
            return f"<i>{name}</i>{index}" if is_variable(name, names) else f"<code>{part}</code>"
        if kind == "sign":
            return SIGNS[part]
        return f"<i>{part}</i>" if is_variable(part.rstrip("\u0302"), names) else part

    return MATH.sub(one, text)


# ---------------------------------------------------------------- a chapter

class Chapter:
    """One file: `rows` of the page, `code` {line: HTML}, `links` {name: anchor}, `words`: all names in its code."""

    def __init__(self, file):
        self.file, self.stem = file, file.removesuffix(".py")
        source = (ROOT / file).read_text(encoding="utf-8")
        self.lines, self.tree, self.tokens = source.splitlines(), ast.parse(source), tokens(source)
        self.words = {text for kind, text, *_ in self.tokens if kind == token.NAME}
        self.hidden, self.links, self.methods = set(), {}, {}
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and f"{node.module}.py" in FILES:
                self.links |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            self.links |= {name: f"{self.stem}.{name}" for name in defined(node)}
        self.rows = [Row(1, 1, file, self.stem, self.docstring(self.tree), set())]
        self.cut()
        self.code = self.highlight()

    def docstring(self, node):
        """The docstring, which is shown as prose; its lines are hidden from the code."""
        if doc := ast.get_docstring(node):
            self.hidden |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return doc or ""

    def cut(self):
        """Find the rows, and `hidden`: the lines that are not shown as code."""
        for n, line in enumerate(self.lines, 1):
            if rule := re.match(r"# -{8,} (.+)", line):
                end = next(i for i in range(n, len(self.lines)) if not self.lines[i].startswith("#"))
                self.hidden |= set(range(n, end + 1))
                prose = "\n".join(comment.removeprefix("# ") for comment in self.lines[n:end])
                self.rows.append(Row(n, 2, rule[1], f"{self.stem}/" + re.sub(r"\W+", "-", rule[1]), prose, set()))
        helpers, used = [], set()       # the first lines of the helpers so far, and all names that the row above uses
        for node in self.tree.body:
            start = self.start(node)
            top = max((row.line for row in self.rows if row.line < start), default=0)
            helpers = [line for line in (*helpers, start) if line > top]
            if self.definition(node, helpers[0]):
                used, helpers = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}, []
            elif used & defined(node) or not defined(node):
                helpers = []            # they belong to the row above; the others to the one below
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                self.definition(method, self.start(method), node.name + ".")
        self.rows.sort()

    def start(self, node):
        """The first line of a definition, with its decorators and the comment above it."""
        line = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())])
        while line > 1 and self.lines[line - 2].startswith("#") and line - 1 not in self.hidden:
            line -= 1
        return line

    def definition(self, node, start, owner=""):
        """Add the row of a definition. False for a helper, which stands in the row of another, and for other code."""
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            return False
        doc, title = self.docstring(node), owner + node.name
        if not doc and (owner or node.name.startswith("_")):
            return False
        anchor = self.methods[title] = f"{self.stem}.{title}"
        names = {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
        self.rows.append(Row(start, 3, title, anchor, doc, names))
        return True

    # ------------------------------------------------------------ code

    def highlight(self):
        """{line: HTML}, by Python's own tokenizer; a name that stands for a definition in the book links to it."""
        headed, local, owner, marks = {row.anchor for row in self.rows}, {}, {}, {}
        for node in ast.walk(self.tree):
            span = range(node.lineno, node.end_lineno + 1) if hasattr(node, "lineno") else ()
            if isinstance(node, ast.ClassDef):
                owner |= dict.fromkeys(span, node.name)
            elif isinstance(node, ast.FunctionDef):
                inside = list(ast.walk(node))[1:]
                bound = {getattr(x, "arg", None) or getattr(x, "id", None) or getattr(x, "name", None) for x in inside
                         if isinstance(x, ast.arg | ast.FunctionDef) or isinstance(getattr(x, "ctx", None), ast.Store)}
                bound -= {name for x in inside if isinstance(x, ast.Global) for name in x.names}
                for n in span:
                    local[n] = local.get(n, set()) | bound
        depth, before, names = 0, ("", ""), [text for _, text, *_ in self.tokens[1:]] + [""]
        for (kind, text, (line, column), (last, end)), after in zip(self.tokens, names, strict=True):
            depth += (text in "([{") - (text in ")]}") if kind == token.OP else 0
            opened, top = "", self.lines[line - 1][0] != " "
            if kind in (token.STRING, token.COMMENT):
                opened = "<s>" if kind == token.STRING else "<em>"
            elif kind == token.NAME and keyword.iskeyword(text):
                opened = "<b>"
            elif kind == token.NAME and (before[1] in ("def", "class") or (column == 0 and after in ("=", ","))):
                opened, anchor = "<u>", self.links.get(text) if top else None
                if anchor and anchor not in headed:
                    opened = f'<u id="{anchor}">'
                    headed.add(anchor)
            elif kind == token.NAME:
                anchor = self.links.get(text)
                if before == ("self", "."):
                    anchor = self.methods.get(f"{owner.get(line)}.{text}")
                elif before[1] == "." or (depth and after == "=") or text in local.get(line, ()):
                    anchor = None
                opened = f'<a href="#{anchor}">' if anchor else ""
            before = before[1], text
            for n in range(line, last + 1) if opened else ():
                span = column if n == line else 0, end if n == last else len(self.lines[n - 1])
                marks.setdefault(n, []).append((*span, opened))
        code = {}
        for n, line in enumerate(self.lines, 1):
            out, at = "", 0
            for a, b, opened in marks.get(n, ()):
                out += escape(line[at:a]) + opened + escape(line[a:b]) + f"</{re.match('<(.[a-z]*)', opened)[1]}>"
                at = b
            code[n] = out + escape(line[at:])
        return code

    # ------------------------------------------------------------ prose

    def prose(self, row):
        """HTML of a docstring, and of its examples and diagrams, which need more room."""
        names, out, lines = {"out", "Loss", "leaf", "data", "self", *row.names}, [], row.doc.splitlines()
        wide = []
        while lines:
            n, indented = 1, lines[0].startswith(" ")
            if lines[0].startswith(">>>"):
                while n < len(lines) and lines[n]:
                    n += 1
                wide.append(plain(lines[:n]))
            elif lines[0]:
                while n < len(lines) and lines[n] and lines[n].startswith(" ") == indented and (
                        indented or lines[n - 1][-1] != "." or len(lines[n - 1] + lines[n].split()[0]) >= 95):
                    n += 1              # (a line that ends early, with a full stop, ends a paragraph)
                if not indented:
                    out.append(f"<p>{self.inline(' '.join(lines[:n]), names)}</p>")
                elif re.search(r"[─-╿►]|--|\n[ \w.]+\(\)(\n|$)", "\n" + "\n".join(lines[:n])):   # a diagram or code
                    wide.append(plain(inspect.cleandoc("\n" + "\n".join(lines[:n])).splitlines()))
                else:
                    out.append(self.formulas(lines[:n], names))
            del lines[:n]
        return "\n".join(out), "".join(wide)

    def inline(self, text, names):
        """HTML of running text, in which code and mathematics are recognised by their form."""
        kept = []

        def keep(found):
            kind, part = found.lastgroup, found[found.lastgroup]
            name = re.match(r"\w*", part)[0]
            if kind == "code" and part.startswith(name + "(") and (name not in self.links or name in UPRIGHT):
                return part                     # exp(x)
            if kind == "code" and part == name and name not in self.words and (
                    name.startswith("sum_") or is_variable(name.split("_")[0], names)):
                return part                     # x_i
            if kind == "source":
                html = f"<cite>{escape(part)}</cite>"
            elif kind == "shape":
                html = f'<span class="m">{typeset(part.replace(" ", NO_BREAK), names)}</span>'
            else:
                html = f"<code>{escape(part if len(part) > 30 else part.replace(' ', NO_BREAK))}</code>"
                html = f'<a href="#{self.links[name]}">{html}</a>' if name in self.links else html
            kept.append(html)
            return chr((0xF000 if kind == "shape" else 0xE000) + len(kept) - 1)

        words = re.findall(r"(\S+)(\s*)", KEPT.sub(keep, text))
        bare = [word.strip('().,;:"').removesuffix("'s") for word, _ in words]
        math = [bool(IS_MATH.fullmatch(word)) for word in bare]
        for i, (word, _) in enumerate(words):
            if word in OPERATORS:
                math[max(i - 1, 0):i + 2] = [True] * len(math[max(i - 1, 0):i + 2])
            elif word[0] >= "\uf000" and i and (bare[i - 1] in names or len(bare[i - 1]) == 1):
                math[i - 1] = True              # x (..., C)
        out, run = "", ""
        for (word, space), is_math in zip([*words, ("", "")], [*math, False], strict=True):
            if is_math:
                run += word + space
                continue
            for part, gap in re.findall(r"((?:\S| (?! ))*\S)( *)", run):
                loose = " (?=[\uf000-\uf8ff])|(?<==) " if len(part) > 29 else " "
                part = re.sub(loose, NO_BREAK, part)
                out += f'<span class="m">{typeset(part, names)}</span>{gap}'
            out, run = out + escape(re.sub("(?<=[\\w\ue000-\uf8ff])'", "’", word)) + space, ""
        return re.sub("[\ue000-\uf8ff]", lambda found: kept[ord(found[0]) & 0xFFF], re.sub("  +", GAP, out))

    def formulas(self, lines, names):
        """HTML of indented lines: a grid, with a column where parts of two lines are aligned."""
        lines = inspect.cleandoc("\n" + "\n".join(lines)).splitlines()

        def words(part):
            found = re.findall(r"(?<!\w)[a-z]{2,}(?!\w)", part)
            return sum(word not in UPRIGHT and not is_variable(word, names) for word in found)

        remarks, table = [], len(lines) > 2 and all(re.fullmatch(r"[\w(), ]+  (?!.*  )[^#= ].*", x) for x in lines)
        for i, line in enumerate(lines):
            found = not table and re.search(r"  +(?:# (.*)|((?!=)(?:(?!  ).)*))$", line)
            last = (found[1] or found[2]) if found else ""
            remarks.append(last if found and (found[1] or words(last) > 1) else "")
            lines[i] = line[:found.start()] if remarks[i] else line
        begins = [{found.end() for found in re.finditer(r"^ *|  +(?=\S)", line)} for line in lines]
        begins = [own | {x for x in set.union(*begins) if re.match(" [=←≈] ", line[x - 1:x + 2])}
                  for own, line in zip(begins, lines, strict=True)]
        stops = sorted({x for own in begins for x in own if sum(x in other for other in begins) > 1} | {0})
        out = f'<div class="f" style="grid-template-columns:{"auto " * len(stops)}1fr">'
        for line, own, remark in zip(lines, begins, remarks, strict=True):
            out += "<div>"
            cuts = sorted(own & set(stops)) or [0]
            for a, b in zip(cuts, [*cuts[1:], None], strict=True):
                parts = []
                for part in re.split("  +", line[a:b].strip()):     # a line may break there or before a second =
                    html = typeset(part, names).replace(" = ", "</span> <span>= ").replace("</span> <span>", " ", 1)
                    prose = words(part) > 2 or (table and a)
                    parts.append(self.inline(part, names) if prose else f"<span>{html}</span>")
                end = -1 if b is None else stops.index(b) + 1
                gap = GAP if b and line[b] not in "=←≈" else ""
                out += f'<div style="grid-column:{stops.index(a) + 1}/{end}">{GAP.join(parts)}{gap}</div>'
            out += f'<div class="n">{self.inline(remark, names)}</div></div>' if remark else "</div>"
        return out + "</div>"

    # ------------------------------------------------------------ the page

    def contents(self):
        """The chapter in the list on the first screen: its public names."""
        about = self.inline(self.rows[0].doc.split(":  python")[0].split("\n\n")[0].strip(".") + ".", set())
        out = f'<div><h2><a href="#{self.stem}">{self.file}</a></h2><p class="about">{about}</p><p>'
        for row in self.rows[1:]:
            link = f'<a href="#{row.anchor}">{re.sub("^.*[.]", ".", row.title)}</a>'
            if row.level == 2:
                out += f"</p>\n<h3>{link}</h3><p>"
            elif "_" not in (row.title[0], row.title.partition(".")[2][:1]):
                out += link + " "
        return out.replace("<p></p>", "") + "</p></div>\n"

    def figure(self, name):
        """A figure and its caption, from docs/figures/."""
        folder = ROOT / "docs" / "figures"
        sections = (folder / "README.md").read_text(encoding="utf-8").split(f"\n## {name}\n\n![")[1]
        alt, caption = re.match(r"(.*)\]\(.*\)\n\n(.*)\n", sections).groups()
        return (f'<figure>{svg(folder / f"{name}.svg", alt)}<figcaption>{self.inline(caption, set())}</figcaption>'
                "</figure>")

    def lesson(self, name):
        """A mistake from lessons/, folded, with its question and the answer, folded once more."""
        def prose(text):
            return self.prose(Row(0, 0, "", "", text, set()))[0]

        source = (ROOT / "lessons" / f"{name}.py").read_text(encoding="utf-8")
        tree, answer = ast.parse(source), source.partition("# The answer\n# ")[2].replace("\n# ", "\n")
        title, command, doc = re.match(r"(?s)(.*):  (python -m .*?)\n\n(.*)", ast.get_docstring(tree)).groups()
        [question] = [ast.literal_eval(node.value) for node in tree.body if defined(node) == {"QUESTION"}]
        heads = re.sub(r"(?<=<p>)(What you see|Why|How nanollm avoids it)\.", r"<b>\1.</b>", prose(doc))
        return (f'<details class="lesson"><summary>{self.inline(title, set())}</summary>{heads}'
                f"<p>Run it: <code>{command}</code></p><p><em>{self.inline(question, set())}</em></p>"
                f"<details><summary>the answer</summary>{prose(answer)}</details></details>")

    def html(self, stops):
        """The rows; `stops` are the anchors of all chapters and sections, for the links back and forward."""
        out = ""
        for row, end in zip(self.rows, [*(row.line for row in self.rows[1:]), len(self.lines) + 1], strict=True):
            about = f'<span class="at">{self.file}:{row.line}</span>' * (row.level > 1)
            if row.level < 3:
                at = stops.index(row.anchor)
                about += "".join(f' <a class="at" href="#{stops[to]}" title="{title}">{arrow}</a>'
                                 for to, title, arrow in ((at - 1, "back", "←"), (at + 1, "forward", "→"))
                                 if 0 <= to < len(stops))
            if row.anchor in FOLDED:
                last = FOLDED[row.anchor].partition(".")[2]
                out += (f'<details class="fast"><summary><code>{last}</code> as the model uses it, a block at a time'
                        "</summary>\n")
            prose, wide = self.prose(row)
            prose += "".join(self.lesson(name) for name, anchor in LESSONS.items() if anchor == row.anchor)
            # The section has the id: its heading is in a sticky column, and a browser scrolls to where that is stuck.
            out += (f'<section class="r{row.level}" id="{row.anchor}"><div class="p"><h{row.level}><a '
                    f'href="#{row.anchor}">{escape(row.title)}</a></h{row.level}> {about}\n{prose}</div>\n')
            shown = []
            for n in range(row.line, end):      # no empty line at either end, and never two in a row
                if n not in self.hidden and (self.lines[n - 1] or (shown and self.lines[shown[-1] - 1])):
                    shown.append(n)
            if shown and not self.lines[shown[-1] - 1]:
                shown.pop()
            gutter, code = "\n".join(map(str, shown)), "\n".join(self.code[n] for n in shown)
            code = f'<div class="k"><pre class="g">{gutter}</pre><pre class="s" tabindex="0">{code}</pre></div>'
            wide += self.figure(FIGURES[row.anchor]) if row.anchor in FIGURES else ""
            if row.level == 1:
                wide += f"<details><summary>the imports</summary>{code}</details>"
            elif shown:
                wide = code + wide
            out += f'<div class="c">{wide}</div></section>\n'
            out += "</details>\n" * (row.anchor in FOLDED.values())
        return out


def defined(node):
    """The names that a statement defines."""
    targets = [getattr(x, "id", getattr(x, "name", None)) for x in getattr(node, "targets", [node])]
    return {name for name in targets if name}


def plain(lines):
    """HTML of lines that stay as they are. A narrow screen shows a diagram whole, in small letters."""
    columns = min(max(map(len, lines)), 62 if lines[0].startswith(">>>") else 100)
    return f'<pre class="e" tabindex="0" style="--columns:{columns}">{escape(chr(10).join(lines))}</pre>'


def tokens(source):
    """[(type, text, start, end)] of the visible tokens; an f-string is one string in every version of Python."""
    out, starts = [], []
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = token.tok_name[t.type]
        if kind.endswith("STRING_START"):
            starts.append(t.start)
        elif kind.endswith("STRING_END"):
            start = starts.pop()
            if not starts:
                out.append((token.STRING, "", start, t.end))
        elif not starts and t.string.strip():
            out.append((t.type, t.string, t.start, t.end))
    return out


def svg(path, alt):
    """A figure as a part of the page: its colours are the page's, its ids its own."""
    text = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "",
                  path.read_text(encoding="utf-8"))
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" \1><title>{escape(alt)}</title>', text)
    text = re.sub(r' id="(?!DejaVu)([^"]+)"|((?:href="|url\()#)(?!DejaVu)', lambda found: (
        found[2] + path.stem + "-" if found[2] else f' id="{path.stem}-{found[1]}"'), text)
    text = re.sub(f'(?<=[: "])({"|".join(COLOURS)})\\b', lambda found: f"var(--{COLOURS[found[0]]})", text)
    text = text.replace("<svg", f'<svg id="{path.stem}"', 1)
    return re.sub(r"\s+", " ", re.sub(r"((?:\d\d|[1-9])\.\d\d)\d+", r"\1", text))


def page():
    chapters = [Chapter(file) for file in FILES]
    stops = [row.anchor for chapter in chapters for row in chapter.rows if row.level < 3]
    template, style, script = ((ROOT / "docs" / f"page.{kind}").read_text(encoding="utf-8")
                               for kind in ("html", "css", "js"))
    glyphs = set()                      # the figures draw the same letters: each is kept once
    return re.sub(r'<path id="(DejaVu[^"]*)"[^>]*/>', lambda found: (
        "" if found[1] in glyphs else glyphs.add(found[1]) or found[0]), Template(template).substitute(
        style=style, script=script, links="".join(f'<a href="#{x.stem}">{x.file}</a>' for x in chapters),
        contents="".join(x.contents() for x in chapters), chapters="".join(x.html(stops) for x in chapters)))


def main():
    target, text = ROOT / "docs" / "index.html", page()
    if "--check" in sys.argv[1:]:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            sys.exit("docs/index.html is out of date: run python docs/page.py")
    else:
        with whole(target) as path:
            path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
