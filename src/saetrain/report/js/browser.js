// The list of latents: only the rows in view are elements, so its length does not matter.
const ROW_HEIGHT = 52;
const SPARE_ROWS = 6;

class Browser {
  constructor(run, sae) {
    Object.assign(this, { run, sae, found: [], firings: null, current: -1 });
    // Strong latents are often clear; dense ones hardly ever are, although they explain the most variance.
    this.settings = { query: "", sort: "max", descending: true, filter: "sparse", token: -1 };
    this.build();
  }

  build() {
    this.search = h("input", { type: "search", id: "search", placeholder: "Token, text or number", "aria-label": "Search tokens, contexts, or the number of a latent", autocomplete: "off", spellcheck: "false" });
    this.search.addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.change({ query: this.search.value }), 150);
    });
    const choices = (entries, current) => entries.map(([value, text]) => h("option", { value, selected: value === current }, text));
    this.sort = h("select", { "aria-label": "Sort by" }, choices(availableSorts(this.sae).map((name) => [name, SORTS[name][0]]), this.settings.sort));
    this.sort.addEventListener("change", () => this.change({ sort: this.sort.value, descending: this.sort.value !== "index" }));
    this.direction = h("button", { type: "button", class: "icon" });
    this.direction.addEventListener("click", () => this.change({ descending: !this.settings.descending }));
    this.filter = h("select", { "aria-label": "Show", title: "Sparse latents fire on up to 10 % of the tokens, dense ones on more" }, choices(Object.entries(FILTERS).map(([name, [text]]) => [name, text]), this.settings.filter));
    this.filter.addEventListener("change", () => this.change({ filter: this.filter.value }));
    this.chip = h("div", { class: "chip", hidden: true });
    this.summary = h("p", { class: "note count", role: "status" });
    this.spacer = h("div", { class: "spacer" });
    this.list = h("div", { class: "list", role: "listbox", tabindex: "0", "aria-label": "Latents" }, this.spacer);
    this.list.addEventListener("scroll", () => this.draw());
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest("[data-latent]");
      if (row) this.open(Number(row.dataset.latent));
    });
    new ResizeObserver(() => this.draw()).observe(this.list);
    this.element = h("section", { class: "browser", "aria-label": "List of latents" },
      h("div", { class: "tools" }, this.search, h("div", { class: "row" }, this.sort, this.direction, this.filter), this.chip, this.summary),
      this.list);
  }

  async change(values) {
    Object.assign(this.settings, values);
    const { token, descending, sort, filter } = this.settings;
    this.sort.value = sort;
    this.filter.value = filter;
    this.chip.hidden = token < 0;
    if (token >= 0) {
      this.chip.replaceChildren(
        h("span", {}, "fires on ", h("b", {}, tokenParts(this.sae.text.vocabulary[token], 40))),
        h("button", { type: "button", class: "icon", "aria-label": "Remove this filter", onclick: () => this.change({ token: -1 }) }, "×"));
    }
    this.direction.replaceChildren(descending ? "↓" : "↑");
    this.direction.setAttribute("aria-label", descending ? "Largest first; reverse" : "Smallest first; reverse");
    const ticket = (this.ticket = {});
    const { found, firings } = await selectLatents(this.sae, this.settings);
    if (ticket !== this.ticket) return;
    Object.assign(this, { found, firings });
    const of = found.length === this.sae.latents ? "" : ` of ${formatCount(this.sae.latents)}`;
    const order = token >= 0 ? ", by firings on this token" : "";
    this.summary.replaceChildren(`${formatCount(found.length)}${of} latents${order}`, h("span", { class: "legend" }, "bar: firing rate"));
    setStyle(this.spacer, { height: `${found.length * ROW_HEIGHT}px` });
    this.list.scrollTop = 0;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const last = Math.min(this.found.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW_HEIGHT) + SPARE_ROWS);
    const rows = [];
    for (let i = first; i < last; i++) rows.push(this.drawRow(i));
    if (!this.found.length) rows.push(h("p", { class: "empty" }, "No latent matches."));
    this.spacer.replaceChildren(...rows);
    const active = document.getElementById(`option-${this.current}`);
    if (active) this.list.setAttribute("aria-activedescendant", active.id);
    else this.list.removeAttribute("aria-activedescendant");
  }

  drawRow(position) {
    const sae = this.sae, latent = this.found[position];
    const [name, values, format] = SORTS[this.settings.sort];
    const keys = values(sae);
    const value = this.firings ? `${formatCount(this.firings.get(latent))} ×` : format(keys ? keys[latent] : latent, sae);
    const words = sae.topTokens(latent).slice(0, 6).map(({ token }) => h("span", { class: "word" }, tokenParts(sae.text.vocabulary[token], 18)));
    const rate = sae.rate(latent);
    const bar = setStyle(h("span", { class: "rate", "aria-hidden": "true" }), { "--share": rate ? Math.max(0.03, 1 + Math.log10(rate) / 5.3) : 0 });
    const row = h("div", {
      title: `fires on ${formatShare(rate)} of tokens`, id: `option-${latent}`, class: "option", role: "option", "data-latent": latent, "aria-selected": String(latent === this.current),
      "aria-setsize": this.found.length, "aria-posinset": position + 1,
    },
      h("span", { class: "number" }, String(latent), notes.read(sae.name, latent) && h("span", { class: "noted", title: "has a note" }, "✎")),
      h("span", { class: "words" }, words.length ? words : h("span", { class: "faint" }, "never fires")),
      h("span", { class: "value", "aria-label": `${name}: ${value}` }, value),
      bar);
    return setStyle(row, { transform: `translateY(${position * ROW_HEIGHT}px)` });
  }

  open(latent) {
    go({ view: "latents", latent });
  }

  select(latent) {
    if (latent !== this.current) this.reveal(latent);
    this.current = latent;
    this.draw();
  }

  reveal(latent) {
    const position = this.found.indexOf(latent);
    if (position < 0) return;
    const top = position * ROW_HEIGHT, view = this.list;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (top + ROW_HEIGHT > view.scrollTop + view.clientHeight) view.scrollTop = top + ROW_HEIGHT - view.clientHeight;
  }

  // The latent ``steps`` places further down the list.
  neighbour(steps) {
    if (!this.found.length) return -1;
    const position = this.found.indexOf(this.current);
    const wanted = position < 0 ? 0 : Math.min(this.found.length - 1, Math.max(0, position + steps));
    return this.found[wanted];
  }

  move(steps) {
    const latent = this.neighbour(steps);
    if (latent < 0 || latent === this.current) return;
    // Keys may repeat faster than latents are drawn.
    this.select(latent);
    this.open(latent);
  }

  onKey(event) {
    const page = Math.max(1, Math.floor(this.list.clientHeight / ROW_HEIGHT) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (steps === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.move(Math.max(-this.found.length, Math.min(this.found.length, steps)));
  }
}
