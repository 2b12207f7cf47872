/* ---- what is shown of tables and responses ---- */
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
all("table:not(.virtual) th button").forEach((button) => button.addEventListener("click", () => {
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

