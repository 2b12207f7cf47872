/* ---- one linked view of a batch's tokens: a class, a point, a bar or a word chooses; everything follows ---- */
const explorers = {};
const POINTS = 900;

all(".explore").forEach((box) => {
  const spec = held(box), tokens = openTokens(spec), { columns } = tokens;
  const name = box.dataset.key, part = (key) => box.querySelector(`[data-part="${key}"]`);
  const ways = Object.keys(spec.classes), colours = ["influence", "entropy", "logprob", "advantage", ...Object.keys(spec.levels)];
  const fresh = () => ({ way: ways[0], class: "", find: "", verdict: "", colour: "influence", token: -1, response: -1, beside: -1 });
  let state = fresh(), rows = new Int32Array(0);
  const size = columns.influence.map((v) => (Number.isFinite(v) ? Math.abs(v) : -1));
  const ranking = Int32Array.from(size.keys()).sort((a, b) => size[b] - size[a]);

  /* What is chosen stands in the address, so that a link leads back to it. */
  const address = () => {
    const said = new URLSearchParams(), usual = fresh();
    ["way", "class", "find", "verdict", "colour"].forEach((key) => { if (state[key] !== usual[key]) said.set(key, state[key]); });
    if (state.token >= 0) said.set("token", tokens.place(state.token));
    else if (state.response >= 0) said.set("response", spec.sequences[state.response].id);
    if (state.beside >= 0) said.set("beside", spec.sequences[state.beside].id);
    return `#${name}${said.size ? "?" + said : ""}`;
  };
  const read = (query) => {
    const said = new URLSearchParams(query), usual = fresh();
    const sequence = (key) => spec.sequences.findIndex((row) => String(row.id) === said.get(key));
    state = Object.fromEntries(Object.entries(usual).map(([key, value]) => [key, said.get(key) ?? value]));
    if (!ways.includes(state.way)) state.way = usual.way;
    if (!colours.includes(state.colour)) state.colour = usual.colour;
    if (!spec.classes[state.way].labels.includes(state.class)) state.class = "";
    state.token = said.has("token") ? tokens.at(said.get("token")) : -1;
    state.response = state.token >= 0 ? tokens.sequence[state.token] : sequence("response");
    state.beside = sequence("beside");
  };
  const change = (changes) => {
    state = { ...state, ...changes };
    history.replaceState(null, "", address());
    update();
  };
  const pick = (i) => change({ token: i, response: tokens.sequence[i], beside: tokens.sequence[i] === state.response ? state.beside : -1 });

  const choice = (label, key, options) => {
    const select = element("select", { onchange: () => change({ [key]: select.value, ...(key === "way" ? { class: "" } : {}) }) },
      ...options.map(([value, text]) => element("option", { value, textContent: text })));
    select.dataset.choice = key;
    part("controls").append(element("label", {}, label + " ", select));
    return select;
  };
  const words = { logprob: "log-prob" };
  const controls = {
    way: choice("Classes by", "way", ways.map((w) => [w, spec.classes[w].title])),
    verdict: choice("Responses", "verdict", [["", "all"], ["right", "right"], ["wrong", "wrong"]]),
    colour: choice("Colour", "colour", colours.map((c) => [c, words[c] || c])),
  };
  let waiting = 0;
  const find = element("input", { type: "search", oninput: () => { clearTimeout(waiting); waiting = setTimeout(() => change({ find: find.value.trim() }), 120); } });
  part("controls").append(element("label", {}, "Responses with ", find),
    element("button", { type: "button", textContent: "Clear", onclick: () => { state = fresh(); change({}); } }));

  /* ---- classes: a bar each, of all that the other choices leave ---- */
  const bars = () => {
    const { labels, codes } = spec.classes[state.way], sums = new Float64Array(labels.length), counts = new Int32Array(labels.length);
    const open = chosenRows({ ...state, class: "" });
    for (const i of open) if (Number.isFinite(columns.influence[i])) { sums[codes[i]] += columns.influence[i]; counts[codes[i]]++; }
    const most = Math.max(...sums.map(Math.abs)) || 1;
    const place = labels.map((_, k) => k).filter((k) => counts[k]);
    if (labels.length > 12) place.sort((a, b) => Math.abs(sums[b]) - Math.abs(sums[a])).splice(12);
    part("bars").replaceChildren(...place.map((k) => {
      const bar = element("span", { className: sums[k] < 0 ? "bar low" : "bar high" });
      bar.style.width = `${(50 * Math.abs(sums[k])) / most}%`;
      const button = element("button", { type: "button", onclick: () => change({ class: state.class === labels[k] ? "" : labels[k] }) },
        element("span", { textContent: labels[k] }), element("span", { className: "track" }, bar),
        element("span", { className: "num", textContent: readable(sums[k]) }), element("span", { className: "num facts-line", textContent: `${counts[k].toLocaleString("en")} tokens` }));
      button.setAttribute("aria-pressed", String(state.class === labels[k]));
      button.dataset.class = labels[k];
      return button;
    }));
  };

  /* ---- points: the largest of the tokens chosen, and some of the rest ---- */
  const cloud = async () => {
    await library();
    const half = POINTS / 2, stride = Math.max(1, Math.ceil((rows.length - half) / half));
    const points = Array.from(rows).filter((i, k) => size[i] >= 0 && (k < half || k % stride === 0 || i === state.token));
    const vars = cssVariables(root.dataset.theme), axis = { gridcolor: vars.grid, linecolor: vars.muted, zerolinecolor: vars.muted, tickcolor: vars.muted, automargin: true };
    const lowers = (low) => points.filter((i) => (columns.influence[i] < 0) === low);
    const trace = (label, chosen, color, symbol) => ({
      type: "scatter", mode: "markers", name: label, customdata: chosen, x: chosen.map((i) => columns.probability[i]), y: chosen.map((i) => columns.influence[i]),
      text: chosen.map((i) => visible(tokens.token(i)).replace(/&/g, "&amp;").replace(/</g, "&lt;")), hovertemplate: "%{text}<br>probability %{x:.3g}<br>influence %{y:.3g}<extra></extra>",
      marker: { color, symbol, size: chosen.map((i) => (i === state.token ? 13 : 6)), line: { width: chosen.map((i) => (i === state.token ? 2 : 0)), color: vars.ink } },
    });
    const place = part("cloud");
    await Plotly.react(place, [trace("lowers", lowers(true), vars.blue, "circle"), trace("raises", lowers(false), vars.vermillion, "diamond")], {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, hovermode: "closest", font: { family: vars.sans, size: 12, color: vars.ink },
      margin: { l: 60, r: 10, t: 30, b: 44 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { align: "left", bgcolor: vars.panel, bordercolor: vars.muted, font: { color: vars.ink, family: vars.sans } },
      xaxis: { ...axis, title: { text: "probability of the token" } }, yaxis: { ...axis, title: { text: `influence, ${spec.unit}` }, zeroline: true },
    }, { responsive: true, displayModeBar: false });
    if (!place.listening) {
      place.listening = true;
      place.on("plotly_click", (event) => pick(event.points[0].customdata));
    }
  };

  /* ---- the table ---- */
  const around = (i, before, after) => {
    const s = tokens.sequence[i], from = Math.max(tokens.first[s], i - before), to = Math.min(tokens.first[s + 1], i + after + 1);
    return [spec.text.slice(from, i), spec.text.slice(i + 1, to)].map((part) => visible(part.map((t) => spec.vocabulary[t]).join("")));
  };
  const numeric = (title, key, width, show = (i) => readable(columns[key][i])) => ({ name: title, width, values: (i) => columns[key][i], show });
  const labelled = (way, width) => ({ name: spec.classes[way].title, width, key: (i) => tokens.classOf(way, i), show: (i) => tokens.classOf(way, i) });
  const table = longTable(part("rows"), [
    { name: "Token", width: "7rem", key: (i) => tokens.token(i), show: (i) => visible(tokens.token(i)) },
    numeric("Influence", "influence", "8rem", (i) => `${readable(columns.influence[i])} ± ${readable(columns.stderr[i], 2)}`),
    { name: "Before it", width: "14rem", key: (i) => around(i, 8, 0)[0], show: (i) => around(i, 8, 0)[0] },
    { name: "After it", width: "14rem", key: (i) => around(i, 0, 8)[1], show: (i) => around(i, 0, 8)[1] },
    numeric("Probability", "probability", "6.5rem"), numeric("Entropy", "entropy", "6rem"), numeric("Advantage", "advantage", "6.5rem"),
    ...ways.map((way) => labelled(way, "9rem")),
    numeric("Response", "sequence", "6rem", (i) => String(columns.sequence[i])), numeric("Position", "position", "6rem", (i) => String(columns.position[i])),
  ], `Tokens chosen (${name})`, pick);
  const room = readingRoom(part("reading"), tokens, pick, (s, beside = -1) => change({ response: s, token: s === state.response ? state.token : -1, beside }));

  /* ---- all of it, by what is chosen ---- */
  const chosenRows = ({ way, class: wanted, find: word, verdict }) => {
    const code = wanted ? spec.classes[way].labels.indexOf(wanted) : -1, { codes } = spec.classes[way], low = word.toLowerCase();
    const fits = spec.sequences.map((row, s) => (!verdict || row.correct === (verdict === "right")) && (!low || tokens.textOf(s).toLowerCase().includes(low)));
    const found = new Int32Array(tokens.count);
    let n = 0;
    for (const i of ranking) if (fits[tokens.sequence[i]] && (code < 0 || codes[i] === code)) found[n++] = i;
    return found.slice(0, n);
  };
  let before = "";
  const update = () => {
    Object.entries(controls).forEach(([key, select]) => { select.value = state[key]; });
    if (document.activeElement !== find) find.value = state.find;
    const now = JSON.stringify([state.way, state.class, state.find, state.verdict]);
    const moved = now !== before;
    before = now;
    if (moved) {
      rows = chosenRows(state);
      const weight = new Float64Array(spec.sequences.length);
      for (const i of rows) weight[tokens.sequence[i]] += Math.abs(columns.influence[i]) || 0;
      box.weight = weight;
      box.responses = new Set(Array.from(rows, (i) => tokens.sequence[i]));
      table.show(rows);
      room.begin();
      const net = rows.reduce((sum, i) => sum + (columns.influence[i] || 0), 0);
      part("chosen").textContent = `${rows.length.toLocaleString("en")} of ${tokens.count.toLocaleString("en")} tokens in ${box.responses.size} responses; together they change the ${spec.quantity} by ${readable(net)} ${spec.by}.`;
    }
    bars();
    table.choose(state.token);
    room.showList(box.responses, box.weight, state);
    room.showResponse(state);
    if (box.seen) cloud();
  };
  explorers[name] = (query) => { read(query); update(); };
  themed.push(() => { if (box.seen) cloud(); });
  new IntersectionObserver((entries, own) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    own.disconnect();
    box.seen = true;
    cloud();
  }, { rootMargin: "600px" }).observe(box);
  update();
});
