/* ---- a table of any length: only the rows in view are in the page ---- */
const ROW = 30, SPARE = 8;

const longTable = (box, columns, label, pick) => {
  let order = new Int32Array(0), by = null, down = true, chosen = -1, wanted = null;
  const body = element("tbody"), head = element("tr");
  columns.forEach((column, at) => {
    const button = element("button", { type: "button", textContent: column.name, onclick: () => sort(at) });
    const th = element("th", { scope: "col", className: column.values ? "num" : "" }, button);
    head.append(th);
  });
  const table = element("table", { className: "virtual" },
    element("colgroup", {}, ...columns.map((c) => element("col", { style: `width:${c.width}` }))),
    element("thead", {}, head), body);
  const scroll = element("div", { className: "scroll long", tabIndex: 0, onscroll: () => fill() }, table);
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", label);
  box.append(scroll);
  const gap = (rows) => {
    const row = element("tr", { className: "gap" }, element("td", { colSpan: columns.length }));
    row.setAttribute("aria-hidden", "true");
    row.style.height = rows * ROW + "px";
    return row;
  };
  const rowOf = (i, place) => {
    const row = element("tr", { className: i === chosen ? "on" : "" }, ...columns.map((column, at) => {
      const cell = element("td", { className: column.values ? "num" : "" });
      if (at === 0) cell.append(element("button", { type: "button", className: "token", textContent: column.show(i), onclick: () => pick(i) }));
      else cell.textContent = column.show(i);
      cell.title = cell.textContent;
      return cell;
    }));
    row.setAttribute("aria-rowindex", String(place + 2));
    return row;
  };
  const fill = (whole = false) => {
    const start = whole ? 0 : Math.max(0, Math.floor(scroll.scrollTop / ROW) - SPARE);
    const stop = Math.min(order.length, whole ? 100 : start + Math.ceil((scroll.clientHeight || 400) / ROW) + 2 * SPARE);
    if (wanted && wanted[0] === start && wanted[1] === stop) return;
    wanted = [start, stop];
    const rows = [];
    if (start) rows.push(gap(start));
    for (let place = start; place < stop; place++) rows.push(rowOf(order[place], place));
    if (stop < order.length && !whole) rows.push(gap(order.length - stop));
    body.replaceChildren(...rows);
  };
  const arrange = () => {
    if (by === null) return;
    const { values, key } = columns[by], turn = down ? -1 : 1;
    const size = values || key;
    const last = (v) => (Number.isNaN(v) ? Infinity : v); /* what is missing comes last either way */
    if (values) order.sort((a, b) => turn * (size(a) - size(b)) || (last(size(a)) === Infinity) - (last(size(b)) === Infinity) || a - b);
    else order.sort((a, b) => turn * (size(a) < size(b) ? -1 : size(a) > size(b) ? 1 : 0) || a - b);
    Array.from(head.children).forEach((th, at) => (at === by ? th.setAttribute("aria-sort", down ? "descending" : "ascending") : th.removeAttribute("aria-sort")));
  };
  const redraw = () => { wanted = null; fill(); };
  const sort = (at, turn = at === by ? !down : true) => {
    by = at;
    down = turn;
    arrange();
    scroll.scrollTop = 0;
    redraw();
  };
  window.addEventListener("beforeprint", () => { wanted = null; fill(true); });
  window.addEventListener("afterprint", redraw);
  return {
    sort,
    show: (rows) => {
      order = rows;
      table.setAttribute("aria-rowcount", String(rows.length + 1));
      arrange();
      scroll.scrollTop = 0;
      redraw();
    },
    choose: (i) => {
      chosen = i;
      const place = order.indexOf(i);
      const top = place * ROW;
      if (place >= 0 && (top < scroll.scrollTop || top > scroll.scrollTop + scroll.clientHeight - 2 * ROW)) scroll.scrollTop = Math.max(0, top - 3 * ROW);
      redraw();
    },
  };
};
