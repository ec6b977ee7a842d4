// Show in the bar where the reader is.
const sections = [...document.querySelectorAll("section")];
const [here] = document.querySelectorAll("nav span"), files = document.querySelectorAll("nav a");
function look() {
  const last = sections.findLast(section => section.getBoundingClientRect().top < 80);
  here.textContent = last ? last.querySelector("h1, h2, h3").textContent : "";
  for (const file of files)
    file.toggleAttribute("aria-current", last?.id.split(/[./]/)[0] == file.hash.slice(1));
}
addEventListener("scroll", () => requestAnimationFrame(look), {passive: true});

// Unfold what a link leads to.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target?.closest("details:not([open])");
  if (folded) {
    folded.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", unfold);
unfold();
