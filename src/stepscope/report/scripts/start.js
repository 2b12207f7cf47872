/* ---- last: once every part stands ---- */
themed.push(() => all(".canvas.drawn").forEach(draw));
applyTheme();
if (tabs.length) show(tabs[0], false);
reveal();
all(".canvas").forEach((div) => watcher.observe(div));
performance.mark("stepscope ready");
