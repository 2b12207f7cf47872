/* ---- the tokens of a batch as the page holds them: columns over tokens, sequence after sequence ---- */
const LEVELS = 5, FIRST_LEVEL = 97 + LEVELS; /* levels of criteria are letters, f being none */

const openTokens = (spec) => {
  const count = spec.text.length, numbers = (values) => Float64Array.from(values, (v) => (v === null ? NaN : v));
  const sequence = new Int32Array(count), first = new Int32Array(spec.sequences.length + 1);
  spec.sequences.forEach((row, s) => {
    first[s + 1] = first[s] + row.length;
    sequence.fill(s, first[s], first[s + 1]);
  });
  const columns = Object.fromEntries(Object.entries(spec.columns).map(([name, values]) => [name, numbers(values)]));
  columns.probability = columns.logprob.map(Math.exp);
  columns.advantage ??= Float64Array.from(sequence, (s) => spec.sequences[s].advantage ?? NaN);
  columns.position = Float64Array.from(sequence, (s, i) => i - first[s]);
  columns.sequence = Float64Array.from(sequence, (s) => spec.sequences[s].id);
  /* Colours: the scale is the 99.5 % quantile of the size, and levels go by its square root. */
  const scales = {};
  const scaleOf = (name) => (scales[name] ??= (() => {
    const sizes = Float64Array.from(columns[name].filter(Number.isFinite), Math.abs).sort();
    return sizes[Math.min(sizes.length - 1, Math.floor(0.995 * sizes.length))] || sizes[sizes.length - 1] || 1;
  })());
  const levelOf = (name, i) => {
    if (spec.levels[name]) return spec.levels[name].charCodeAt(i) - FIRST_LEVEL;
    const value = columns[name][i];
    if (!Number.isFinite(value)) return 0;
    return Math.sign(value) * Math.min(LEVELS, Math.round(LEVELS * Math.sqrt(Math.abs(value) / scaleOf(name))));
  };
  const texts = [];
  const textOf = (s) => (texts[s] ??= spec.text.slice(first[s], first[s + 1]).map((t) => spec.vocabulary[t]).join(""));
  return {
    spec, count, sequence, first, columns, levelOf, textOf,
    token: (i) => spec.vocabulary[spec.text[i]],
    classOf: (way, i) => spec.classes[way].labels[spec.classes[way].codes[i]],
    place: (i) => spec.sequences[sequence[i]].id + "." + (i - first[sequence[i]]),
    at: (place) => {
      const [id, position] = String(place).split(".").map(Number);
      const s = spec.sequences.findIndex((row) => row.id === id);
      return s < 0 || !(position < spec.sequences[s].length) ? -1 : first[s] + position;
    },
  };
};
const readable = (value, digits = 3) => {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const exponent = Math.floor(Math.log10(Math.abs(value)));
  if (exponent >= -4 && exponent < 6) return value.toFixed(Math.max(0, digits - 1 - exponent)).replace("-", "−");
  return value.toExponential(digits - 1).replace(/-/g, "−");
};
const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
