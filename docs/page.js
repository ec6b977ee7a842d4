// Say in the bar where the reader is.
const marks = [...document.querySelectorAll("section :is(h1, h2, h3)")];
const [here] = document.querySelectorAll("nav span"), files = document.querySelectorAll("nav a");
function look() {
  const last = marks.findLastIndex(mark => mark.getBoundingClientRect().top < 80);
  here.textContent = last < 0 ? "" : marks[last].textContent;
  for (const file of files)
    file.toggleAttribute("aria-current", last >= 0 && marks[last].id.split(/[./]/)[0] == file.hash.slice(1));
}
addEventListener("scroll", () => requestAnimationFrame(look), {passive: true});
