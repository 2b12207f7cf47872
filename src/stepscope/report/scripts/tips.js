/* ---- one tooltip for tokens and flags; arrow keys walk through the tokens ---- */
const tip = document.getElementById("tip");
const showTip = (element) => {
  tip.textContent = element.dataset.tip;
  tip.hidden = false;
  const box = element.getClientRects()[0] || element.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(box.left, window.innerWidth - size.width - 8)) + "px";
  tip.style.top = (box.top - size.height - 6 > 0 ? box.top - size.height - 6 : box.bottom + 6) + "px";
};
const hideTip = () => { tip.hidden = true; };
document.addEventListener("mouseover", (event) => {
  const element = event.target.closest && event.target.closest("[data-tip]");
  if (element) showTip(element); else hideTip();
});
document.addEventListener("focusin", (event) => { if (event.target.dataset && event.target.dataset.tip) showTip(event.target); });
document.addEventListener("scroll", () => {
  const walking = document.querySelector(".t.on");
  if (walking) showTip(walking); else hideTip();
}, true);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
/* The arrow keys walk through a line of tokens; those of a line drawn later, too. */
const leaveLine = (line) => { all(".on", line).forEach((token) => token.classList.remove("on")); hideTip(); };
document.addEventListener("focusout", (event) => { if (event.target.matches(".tokens[tabindex]")) leaveLine(event.target); });
document.addEventListener("keydown", (event) => {
  const line = event.target, step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !line.matches(".tokens[tabindex]")) return;
  event.preventDefault();
  const tokens = all("[data-tip]", line), at = tokens.findIndex((token) => token.classList.contains("on"));
  leaveLine(line);
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, at + step))];
  if (!next) return;
  next.classList.add("on");
  next.scrollIntoView({ block: "nearest" });
  showTip(next);
});
