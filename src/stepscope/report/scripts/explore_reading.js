/* ---- responses to read: the one chosen beside another one to the same prompt, aligned by what they share ---- */
const PALETTE = { influence: ["n", "p"] }; /* blue and orange are for what lowers and raises, and nothing else */

const readingRoom = (box, tokens, pick, choose) => {
  const { spec, first } = tokens;
  const others = (s) => spec.sequences.map((_, o) => o).filter((o) => o !== s && spec.sequences[o].prompt === spec.sequences[s].prompt);
  const shared = (a, b) => {
    const most = Math.min(spec.sequences[a].length, spec.sequences[b].length);
    let k = 0;
    while (k < most && spec.text[first[a] + k] === spec.text[first[b] + k]) k++;
    return k;
  };
  const verdict = (s) => {
    const { correct } = spec.sequences[s];
    return correct === null ? "" : correct ? "✓ right" : "✗ wrong";
  };
  const tipOf = (i) => {
    const { columns } = tokens, row = spec.sequences[tokens.sequence[i]];
    const parts = [`influence ${readable(columns.influence[i])} ± ${readable(columns.stderr[i], 2)} ${spec.by}`];
    parts.push(`probability ${readable(columns.probability[i])}`, `log-prob ${readable(columns.logprob[i])}`, `entropy ${readable(columns.entropy[i])}`, `advantage ${readable(columns.advantage[i])}`);
    return `${visible(tokens.token(i))}: ${Number.isFinite(columns.influence[i]) ? parts.join(", ") : "context, not written by the policy"} (response ${row.id}, token ${i - first[tokens.sequence[i]]})`;
  };
  const spans = (s, from, to, state) => {
    const made = [], [low, high] = PALETTE[state.colour] || ["r", "q"];
    for (let i = first[s] + from; i < first[s] + to; i++) {
      const level = tokens.levelOf(state.colour, i);
      const span = element("span", { textContent: tokens.token(i) });
      span.className = "t" + (level ? ` ${level < 0 ? low : high}${Math.abs(level)}` : "") + (i === state.token ? " mark" : "");
      span.dataset.tip = tipOf(i);
      span.dataset.i = i;
      made.push(span);
    }
    return made;
  };
  const line = (label, made, className = "") => {
    const p = element("p", { className: `tokens ${className}`, tabIndex: 0 }, ...made);
    p.setAttribute("role", "group");
    p.setAttribute("aria-label", label);
    return p;
  };
  const facts = (s) => {
    const row = spec.sequences[s];
    return [verdict(s), `reward ${readable(row.reward)}`, row.advantage === null ? "" : `advantage ${readable(row.advantage)}`,
      `influence ${readable(row.influence)} ${spec.by}`, row.truncated ? "truncated" : ""].filter(Boolean).join(", ");
  };
  box.addEventListener("click", (event) => {
    const span = event.target.closest("[data-i]");
    if (span) pick(Number(span.dataset.i));
  });
  box.addEventListener("keydown", (event) => {
    const span = event.key === "Enter" && event.target.matches(".tokens") && event.target.querySelector(".on");
    if (span) pick(Number(span.dataset.i));
  });
  const list = element("ol", { className: "found" }), read = element("div", { className: "read" });
  box.append(list, read);
  let most = 8;
  const showList = (sequences, weight, state) => {
    const sorted = Array.from(sequences).sort((a, b) => weight[b] - weight[a]);
    const entry = (s) => {
      const text = tokens.textOf(s), at = state.find ? Math.max(0, text.toLowerCase().indexOf(state.find.toLowerCase()) - 30) : 0;
      const button = element("button", { type: "button", onclick: () => choose(s) },
        element("span", { className: "who", textContent: `${spec.sequences[s].id} ${verdict(s)}` }),
        element("span", { className: "what", textContent: (at ? "…" : "") + text.slice(at, at + 110) + (text.length > at + 110 ? "…" : "") }));
      button.setAttribute("aria-pressed", String(s === state.response));
      return element("li", {}, button);
    };
    const more = sorted.length > most
      ? [element("li", {}, element("button", { type: "button", className: "more", textContent: `${sorted.length - most} more responses`, onclick: () => { most *= 4; showList(sequences, weight, state); } }))]
      : [];
    list.replaceChildren(...sorted.slice(0, most).map(entry), ...more);
  };
  const showResponse = (state) => {
    const s = state.response;
    if (s < 0) {
      read.replaceChildren(element("p", { className: "caption", textContent: "Choose a token, a point or a response." }));
      return;
    }
    const row = spec.sequences[s], beside = others(s).map((o) => [o, shared(s, o)]);
    const differs = (o) => spec.sequences[o].correct !== row.correct;
    beside.sort((a, b) => differs(b[0]) - differs(a[0]) || b[1] - a[1]);
    const other = beside.some(([o]) => o === state.beside) ? state.beside : beside.length ? beside[0][0] : -1;
    const select = element("select", { onchange: () => choose(s, Number(select.value)) },
      ...beside.map(([o, k]) => element("option", { value: o, textContent: `response ${spec.sequences[o].id}, ${verdict(o)}, shares ${k} tokens` })));
    select.value = String(other);
    const common = other < 0 ? 0 : shared(s, other);
    const column = (o) => element("div", {},
      element("p", { className: "h4",  textContent: `Response ${spec.sequences[o].id}` }), element("p", { className: "facts-line", textContent: facts(o) }),
      line(`Tokens of response ${spec.sequences[o].id}; use the arrow keys`, spans(o, common, spec.sequences[o].length, state)));
    read.replaceChildren(
      element("p", { className: "prompt", textContent: spec.prompts[row.prompt] }),
      ...(other < 0 ? [] : [element("p", { className: "controls" }, element("label", {}, "Beside ", select))]),
      ...(common ? [element("p", { className: "facts-line", textContent: `Both begin with these ${common} tokens (coloured as in response ${row.id}):` }),
        line("Tokens that both responses share; use the arrow keys", spans(s, 0, common, state), "shared")] : []),
      element("div", { className: other < 0 ? "" : "beside" }, column(s), ...(other < 0 ? [] : [column(other)])));
  };
  return { showList, showResponse, begin: () => { most = 8; } };
};
