/* ---- tabs ---- */
const tabs = all('[role="tab"]');
const show = (tab, focus) => {
  tabs.forEach((other) => {
    const on = other === tab;
    other.setAttribute("aria-selected", String(on));
    other.tabIndex = on ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !on;
  });
  all("[data-toc-of]").forEach((list) => { list.hidden = list.dataset.tocOf !== tab.getAttribute("aria-controls"); });
  if (focus) tab.focus();
};
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => show(tab, false));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(tabs[(index + step + tabs.length) % tabs.length], true);
    else if (event.key === "Home") show(tabs[0], true);
    else if (event.key === "End") show(tabs[tabs.length - 1], true);
    else return;
    event.preventDefault();
  });
});
/* An address leads to a place of the page, its tab shown and its folds open; after "?" to what is chosen there. */
const reveal = () => {
  const [id, query = ""] = location.hash.slice(1).split(/\?(.*)/s);
  const target = id && document.getElementById(decodeURIComponent(id));
  if (!target) return;
  const panel = target.closest('[role="tabpanel"]');
  if (panel) show(document.getElementById(panel.getAttribute("aria-labelledby")), false);
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  all(":scope > details.fold", target).forEach((fold) => { fold.open = true; });
  if (explorers[id]) explorers[id](query);
  target.scrollIntoView();
};
window.addEventListener("hashchange", reveal);
/* Printed is everything of the tabs shown, folds open and figures drawn. */
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = all("main details:not([open])");
  folded.forEach((fold) => { fold.open = true; });
  all(".canvas:not(.drawn)").filter((div) => div.checkVisibility()).forEach(draw);
});
window.addEventListener("afterprint", () => folded.forEach((fold) => { fold.open = false; }));
