// A box above every table of more than a dozen rows that shows the rows with all words in it.
document$.subscribe(() => {
  for (const table of document.querySelectorAll("article table")) {
    const rows = [...table.querySelectorAll("tbody tr")];
    if (rows.length < 12 || table.closest(".dicompile") || table.dataset.filtered) continue;
    table.dataset.filtered = "yes";
    const box = Object.assign(document.createElement("input"), {
      type: "search", className: "row-filter", placeholder: `filter ${rows.length} rows`, ariaLabel: "filter rows",
    });
    box.addEventListener("input", () => {
      const words = box.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    table.before(box);
  }
});
