"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => Array.from(from.querySelectorAll(selector));

  /* ---- light and dark: the reader's choice, else the system's ---- */
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const applyTheme = () => {
    root.dataset.theme = chosen || (system.matches ? "dark" : "light");
    all(".canvas.drawn").forEach((div) => draw(div));
  };
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    applyTheme();
  });
  system.addEventListener("change", applyTheme);

  /* ---- figures: colours are CSS variables, resolved for the theme at hand ---- */
  const known = {};
  const cssVariables = (theme) => {
    if (known[theme]) return known[theme];
    const before = root.dataset.theme;
    root.dataset.theme = theme;
    const style = getComputedStyle(root);
    const values = {};
    ["paper", "panel", "ink", "muted", "rule", "grid", "link", "blue", "vermillion", "green", "purple", "blue-soft", "vermillion-soft", "sans"].forEach(
      (name) => { values[name] = style.getPropertyValue("--" + name).trim(); });
    root.dataset.theme = before;
    known[theme] = values;
    return values;
  };
  const resolve = (value, vars) => {
    if (typeof value === "string") return value.replace(/^var\(--([a-z-]+)\)$/, (_, name) => vars[name]);
    if (Array.isArray(value)) return value.map((item) => resolve(item, vars));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, vars)]));
    return value;
  };
  const specOf = (div, theme, width) => {
    const vars = cssVariables(theme);
    const spec = resolve(JSON.parse(div.parentElement.querySelector("script").textContent), vars);
    const narrow = width < 560, small = narrow ? 11 : 12;
    const axis = {
      gridcolor: vars.grid, linecolor: vars.muted, zeroline: false, zerolinecolor: vars.muted, zerolinewidth: 1, showline: true,
      ticks: "outside", tickcolor: vars.muted, tickfont: { size: small }, automargin: true,
    };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, hovermode: "closest",
      font: { family: vars.sans, size: small, color: vars.ink },
      margin: { l: narrow ? 50 : 64, r: 14, t: narrow && spec.layout.showlegend !== false ? 64 : 40, b: 46 },
      legend: { traceorder: "normal", orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left" },
      hoverlabel: { align: "left", bgcolor: vars.panel, bordercolor: vars.muted, font: { color: vars.ink, family: vars.sans } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: vars.muted, activecolor: vars.link },
      ...spec.layout,
    };
    Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).forEach((key) => {
      layout[key] = { ...axis, ...layout[key] };
      if (layout[key].title) layout[key].title = { standoff: 8, ...layout[key].title, font: { size: small + 1 } };
    });
    return { data: spec.data, layout };
  };
  const save = (div, format) => {
    const width = Math.max(640, div.clientWidth), height = div.clientHeight;
    const spec = specOf(div, "light", width);
    spec.layout = { ...spec.layout, width, height, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff" };
    return Plotly.downloadImage(spec, { format, width, height, scale: format === "png" ? 2 : 1, filename: "stepscope-" + div.dataset.name });
  };
  const draw = (div) => {
    const spec = specOf(div, root.dataset.theme, div.clientWidth);
    div.classList.add("drawn");
    return Plotly.react(div, spec.data, spec.layout, {
      responsive: true, displaylogo: false, displayModeBar: true, plotlyServerURL: "",
      modeBarButtons: [[
        "zoom2d", "resetScale2d",
        { name: "svg", title: "Save as SVG", icon: Plotly.Icons.disk, click: () => save(div, "svg") },
        { name: "png", title: "Save as PNG", icon: Plotly.Icons.camera, click: () => save(div, "png") },
      ]],
    }).then(() => choosing(div));
  };
  const watcher = new IntersectionObserver((entries) => {
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
      watcher.unobserve(entry.target);
      draw(entry.target);
    });
  }, { rootMargin: "800px" });
  window.addEventListener("beforeprint", () => all(".canvas:not(.drawn)").filter((d) => d.checkVisibility()).forEach(draw));
  all("[data-export]").forEach((button) => button.addEventListener("click", () =>
    save(button.closest("figure").querySelector(".canvas"), button.dataset.export)));

  /* ---- boards: tables whose rows the reader chooses ---- */
  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const shown = (value) => value === null || value === undefined ? "–" : (Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(1) : value.toFixed(3)).replace("-", "−");
  const boardCell = (column, value, note) => {
    const cell = element("td");
    if (column.err) {
      const [number, error] = value || [null, null];
      cell.className = "num";
      cell.dataset.v = number === null ? "nan" : number;
      if (error !== null && error !== undefined) cell.dataset.e = error;
      cell.textContent = number === null ? "–" : error === null ? shown(number) : shown(number) + "\u00a0±\u00a0" + shown(error);
    } else if (note) {
      cell.dataset.v = value;
      const name = element("span", { textContent: value, tabIndex: 0, className: "named" });
      name.dataset.tip = note;
      cell.append(name);
    } else {
      cell.dataset.v = cell.textContent = value;
    }
    return cell;
  };
  all(".board").forEach((board) => {
    const spec = JSON.parse(board.querySelector("script").textContent);
    const body = board.querySelector("tbody"), head = element("tr");
    spec.columns.forEach((column) => {
      const th = element("th", { scope: "col", className: column.err ? "num" : "" }, element("button", { type: "button", textContent: column.name }));
      th.dataset.label = column.name;
      if (column.err) th.dataset.err = "";
      if (column.anchor) {
        const link = element("a", { className: "def", href: "#" + column.anchor, textContent: "?" });
        link.setAttribute("aria-label", "Definition: " + column.name);
        th.append(link);
      }
      head.append(th);
    });
    board.querySelector("thead").append(head);
    const size = ([, cells]) => Math.abs((cells[spec.sort] || [0])[0] || 0);
    const fill = () => {
      const wanted = selects.map((select) => select.value);
      all("th", head).forEach((th) => th.removeAttribute("aria-sort"));
      body.replaceChildren(...spec.rows
        .filter(([values]) => values.every((value, i) => !wanted[i] || value === wanted[i]))
        .sort((a, b) => size(b) - size(a))
        .map(([, cells]) => element("tr", {}, ...cells.map((cell, i) => boardCell(spec.columns[i], cell, i === 0 ? spec.notes[cell] : "")))));
    };
    const selects = spec.filters.map((filter) => {
      const select = element("select", { onchange: fill }, ...filter.options.map(([value, label]) => element("option", { value, textContent: label })));
      select.value = filter.first;
      select.dataset.filter = filter.key;
      board.querySelector(".controls").append(element("label", {}, filter.label + " ", select));
      return select;
    });
    fill();
  });
  /* ---- excerpts: tokens in their responses, chosen by lists or by a click in a figure of the panel ---- */
  all(".excerpts").forEach((box) => {
    const spec = JSON.parse(box.querySelector("script").textContent);
    const choice = (label, values) => {
      const select = element("select", { onchange: () => fill() }, element("option", { value: "", textContent: "all" }),
        ...values.map((value) => element("option", { value, textContent: value })));
      box.querySelector(".controls").append(element("label", {}, label + " ", select));
      return select;
    };
    const step = choice("Step", spec.steps.map(String)), kind = choice("Class", spec.classes);
    const fill = () => {
      const rows = spec.rows
        .filter((row) => (!step.value || String(row[0]) === step.value) && (!kind.value || row[1] === kind.value))
        .sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, spec.most);
      box.querySelector(".found").replaceChildren(...rows.map(([, , , facts, prompt, at, tokens]) => element("div", { className: "excerpt" },
        element("p", { className: "facts-line", textContent: facts }),
        element("p", { className: "tokens" }, element("span", { className: "asked", textContent: prompt + " " }),
          ...tokens.map(([text, level], k) => element("span", {
            className: "t" + (level ? " " + (level < 0 ? "n" : "p") + Math.abs(level) : "") + (k === at ? " mark" : ""), textContent: text }))))),
        ...(rows.length ? [] : [element("p", { className: "caption", textContent: "No token of this choice is among those kept on the page; all are in ledger.parquet." })]));
    };
    box.choose = (picked) => {
      step.value = spec.steps.includes(picked[0]) ? String(picked[0]) : "";
      kind.value = spec.classes.includes(picked[1]) ? picked[1] : "";
      fill();
      box.scrollIntoView({ block: "nearest" });
    };
    fill();
  });
  const choosing = (div) => {
    const panel = div.closest(".measurement"), box = panel && panel.querySelector(".excerpts");
    if (!box || div.choosing) return;
    div.choosing = true;
    div.on("plotly_click", (event) => {
      const picked = event.points[0].customdata;
      if (Array.isArray(picked)) box.choose(picked);
    });
  };
  all("[data-find]").forEach((input) => input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    all("tbody tr", input.closest(".table")).forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
  }));
  all("[data-verdicts]").forEach((select) => select.addEventListener("change", () =>
    all("[data-verdict]", select.closest("section")).forEach((response) => {
      response.hidden = select.value !== "" && response.dataset.verdict !== select.value;
    })));

  /* ---- tables: sort and CSV of the rows shown ---- */
  const valueOf = (row, column) => row.children[column].dataset.v;
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    const bothNumbers = a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y);
    if (bothNumbers) return x - y;
    if (a === "nan") return 1;
    if (b === "nan") return -1;
    return a.localeCompare(b);
  };
  all("th button").forEach((button) => button.addEventListener("click", () => {
    const th = button.parentElement, column = Array.from(th.parentElement.children).indexOf(th);
    const body = th.closest("table").tBodies[0];
    const down = th.getAttribute("aria-sort") === "ascending";
    all("th", th.parentElement).forEach((other) => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows).sort((a, b) => compare(valueOf(a, column), valueOf(b, column)));
    if (down) rows.reverse();
    body.append(...rows);
  }));
  const csvField = (text) => {
    let field = String(text);
    if (/^[=+\-@\t\r]/.test(field) && Number.isNaN(Number(field))) field = "'" + field;
    return /[",\n\r]/.test(field) ? '"' + field.replace(/"/g, '""') + '"' : field;
  };
  const csvOf = (table) => {
    const heads = all("th", table);
    const parts = ["", " (standard error)", " (unreliable because)"];
    const lines = [heads.flatMap((th) => "err" in th.dataset ? parts.map((part) => th.dataset.label + part) : [th.dataset.label])];
    Array.from(table.tBodies[0].rows).filter((row) => !row.hidden).forEach((row) => lines.push(heads.flatMap((th, i) => {
      const cell = row.children[i];
      return "err" in th.dataset ? [cell.dataset.v, cell.dataset.e || "", cell.dataset.flag || ""] : [cell.dataset.v];
    })));
    return lines.map((line) => line.map(csvField).join(",")).join("\r\n") + "\r\n";
  };
  all("[data-csv]").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    const table = link.closest(".table").querySelector("table");
    const download = document.createElement("a");
    download.href = URL.createObjectURL(new Blob([csvOf(table)], { type: "text/csv" }));
    download.download = "stepscope-" + table.dataset.name + ".csv";
    download.click();
    setTimeout(() => URL.revokeObjectURL(download.href), 1000);
  }));

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
  const reveal = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const panel = target && target.closest('[role="tabpanel"]');
    if (panel) {
      show(document.getElementById(panel.getAttribute("aria-labelledby")), false);
      target.scrollIntoView();
    }
  };
  window.addEventListener("hashchange", reveal);

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
  all(".tokens[tabindex]").forEach((line) => {
    let at = -1;
    const leave = () => { all(".on", line).forEach((token) => token.classList.remove("on")); hideTip(); };
    line.addEventListener("blur", leave);
    line.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      leave();
      const tokens = all("[data-tip]", line);
      at = Math.max(0, Math.min(tokens.length - 1, at + step));
      tokens[at].classList.add("on");
      tokens[at].scrollIntoView({ block: "nearest" });
      showTip(tokens[at]);
    });
  });

  applyTheme();
  if (tabs.length) show(tabs[0], false);
  reveal();
  all(".canvas").forEach((div) => watcher.observe(div));
})();
