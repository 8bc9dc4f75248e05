// Views, permalinks, notes, keyboard and theme.
const NARROW = 900; // Width in pixels below which the list and a latent are shown one at a time.
const VIEWS = { run: "Run", sae: "SAE", latents: "Latents" };
const KEYS = [
  ["/", "search"],
  ["j, k", "next, previous latent of the list"],
  ["↑ ↓ PgUp PgDn", "move in the list, once it has the focus"],
  ["n", "write a note"],
  ["1, 2, 3", "run, SAE, latents"],
  ["Esc", "leave a field, or return to the list"],
  ["?", "this help"],
];
const state = { view: "run", sae: "", latent: -1 };
const browsers = new Map();
let run = null;

// Notes ----------------------------------------------------------------------------------------------------------------
const notes = {
  all: {},
  load() {
    this.all = readStored(`saetrain.notes.${run.id}`, {});
  },
  read(sae, latent) {
    return this.all[sae]?.[latent] ?? "";
  },
  write(sae, latent, text) {
    const own = (this.all[sae] ??= {});
    if (text.trim()) own[latent] = text;
    else delete own[latent];
    if (!writeStored(`saetrain.notes.${run.id}`, this.all)) announce("This browser does not store the note; export it before you close the page");
    showNoteCount();
  },
  count() {
    return Object.values(this.all).reduce((sum, own) => sum + Object.keys(own).length, 0);
  },
  export() {
    saveFile("notes.json", JSON.stringify({ run: run.name, notes: this.all }, null, 1));
  },
};

function showNoteCount() {
  const button = document.getElementById("export");
  const count = notes.count();
  button.hidden = count === 0;
  button.textContent = `Export ${count} note${count === 1 ? "" : "s"}`;
}

// Addresses -------------------------------------------------------------------------------------------------------------
const wellFormed = (text) => (text.toWellFormed ? text.toWellFormed() : text);

function permalink(changes) {
  const wanted = { ...state, ...changes };
  if (changes.sae && changes.sae !== state.sae) wanted.latent = changes.latent ?? -1;
  const parts = [];
  if (run.saes.length > 1) parts.push(`s=${encodeURIComponent(wellFormed(wanted.sae))}`);
  if (wanted.view === "latents" && wanted.latent >= 0) parts.push(`l=${wanted.latent}`);
  else if (wanted.view !== "run") parts.push(`v=${wanted.view}`);
  if (wanted.view === "prompt" && wanted.latent >= 0) parts.push(`l=${wanted.latent}`);
  if (changes.token >= 0) parts.push(`t=${changes.token}`);
  const entry = run.saes.find(({ name }) => name === wanted.sae);
  return `${wanted.view !== "run" && entry?.href ? entry.href : ""}#${parts.join("&")}`;
}

function go(changes) {
  const target = permalink(changes);
  if (target === location.hash) render();
  else location.assign(target);
}

function readAddress() {
  let values;
  try {
    values = new URLSearchParams(location.hash.slice(1));
  } catch {
    values = new URLSearchParams();
  }
  const named = run.saes.find(({ name }) => wellFormed(name) === values.get("s"));
  const sae = named ?? run.saes.find(({ href }) => !href) ?? run.saes[0];
  const latent = /^\d+$/.test(values.get("l") ?? "") ? Number(values.get("l")) : -1;
  const given = values.get("v");
  const view = given !== "prompt" && (latent >= 0 || values.has("t")) ? "latents" : given;
  return { sae: sae.name, latent: latent < sae.latents ? latent : -1, view: Object.hasOwn(VIEWS, view) ? view : "run", token: Number(values.get("t") ?? -1) };
}

// Views -----------------------------------------------------------------------------------------------------------------
async function render() {
  const { token, ...wanted } = readAddress();
  Object.assign(state, wanted);
  const ticket = (render.ticket = {});
  const sae = run.saes.find(({ name }) => name === state.sae);
  const main = document.getElementById("main");
  hideTip();
  showHeader();
  let content;
  try {
    content = sae.href && state.view !== "run" ? leaveFor(sae) : await buildView(sae, token);
  } catch (error) {
    content = h("p", { class: "empty" }, `The data of this view can't be read: ${error.message}. Write the report again.`);
    console.error(error);
  }
  if (ticket !== render.ticket || !content) return;
  main.classList.toggle("split", state.view === "latents");
  main.classList.toggle("has-latent", state.latent >= 0);
  if (main.firstElementChild !== content || main.childElementCount > 1) main.replaceChildren(content);
  document.title = `${state.view === "latents" && state.latent >= 0 ? `Latent ${state.latent} · ` : state.view === "run" ? "" : `${VIEWS[state.view]} · `}${shorten(run.name, 60)} · saetrain`;
  if (state.view !== render.view) scrollTo(0, 0);
  render.view = state.view;
  document.documentElement.dataset.ready = `${state.view}:${state.sae}:${state.latent}`;
}

function buildView(sae, token) {
  if (state.view === "run") return showRun(run, state);
  if (state.view === "sae") return showSae(run, sae);
  // Only a served page has this view and its script.
  if (state.view === "prompt") return showPrompt(run, sae, state.latent);
  return showLatents(sae, token);
}

function leaveFor() {
  location.replace(permalink({}));
  return null;
}

async function showLatents(sae, token) {
  if (!sae.features) {
    return h("div", { class: "page" }, h("h1", {}, "Latents"), h("p", { class: "empty" }, "This run has no features of this SAE. Collect them with `saetrain features RUN`, then write the report again."));
  }
  await sae.load();
  let found = browsers.get(sae.name);
  if (!found) {
    const browser = new Browser(run, sae);
    const detail = h("div", { class: "detail" });
    found = { browser, detail, element: h("div", { class: "latents" }, browser.element, detail), shown: -2 };
    browsers.set(sae.name, found);
    await browser.change({});
  }
  const { browser, detail } = found;
  if (token >= 0 && token < sae.text.vocabulary.length && token !== browser.settings.token) {
    await browser.change({ token, filter: "alive", query: "" });
    browser.search.value = "";
  }
  const latent = state.latent >= 0 || innerWidth < NARROW ? state.latent : browser.found[0] ?? -1;
  if (latent !== found.shown) {
    const ticket = (found.ticket = {});
    const content = latent >= 0 ? await showLatent(run, sae, latent, browser) : h("p", { class: "empty" }, "Choose a latent from the list.");
    if (ticket === found.ticket) {
      detail.replaceChildren(content);
      detail.scrollTop = 0;
      found.shown = latent;
    }
  }
  requestAnimationFrame(() => browser.select(latent));
  return found.element;
}

function showHeader() {
  for (const link of document.querySelectorAll("#top nav a")) {
    const view = link.dataset.view;
    link.setAttribute("href", permalink({ view, latent: view === "latents" ? browsers.get(state.sae)?.browser.current ?? -1 : -1 }));
    if (view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const choice = document.getElementById("sae");
  if (choice) choice.value = String(run.saes.findIndex(({ name }) => name === state.sae));
}

function buildHeader() {
  const choice = h("select", { id: "sae", "aria-label": "SAE", onchange: (event) => go({ sae: run.saes[event.target.value].name, latent: -1 }) },
    run.saes.map(({ name }, i) => h("option", { value: i }, shorten(name, 48))));
  document.getElementById("top").replaceChildren();
  fillElement(document.getElementById("top"), {}, [
    h("a", { class: "brand", href: "#" }, "saetrain"),
    h("nav", { "aria-label": "Views" }, Object.entries(VIEWS).map(([view, text]) => h("a", { "data-view": view, href: "#" }, text))),
    run.saes.length > 1 && choice,
    h("span", { class: "grow" }),
    h("button", { type: "button", id: "export", hidden: true, onclick: () => notes.export() }),
    h("button", { type: "button", class: "icon", id: "theme", onclick: switchTheme }, "◐"),
    h("button", { type: "button", class: "icon", "aria-label": "Keyboard and help", onclick: showHelp }, "?"),
  ]);
  document.body.append(
    h("div", { id: "tip", role: "tooltip", hidden: true }),
    h("div", { id: "status", role: "status", "aria-live": "polite" }),
    h("dialog", { id: "help", "aria-label": "Help" },
      h("h2", {}, "Keyboard"),
      h("dl", {}, KEYS.map(([key, text]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)))),
      h("p", { class: "note" }, "A click on a token lists the latents that fire on it, as far as it is one of their most frequent tokens. Notes stay in this browser until you export them."),
      h("form", { method: "dialog" }, h("button", {}, "Close"))));
}

function showHelp() {
  document.getElementById("help").showModal();
}

function switchTheme() {
  const themes = ["auto", "light", "dark"];
  const next = themes[(themes.indexOf(readStored("saetrain.theme", "auto")) + 1) % 3];
  writeStored("saetrain.theme", next);
  applyTheme(next);
  announce(`Theme: ${next === "auto" ? "as the system" : next}`);
  for (const figure of document.querySelectorAll(".map-chart")) figure.redraw();
}

function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  document.getElementById("theme").setAttribute("aria-label", `Theme: ${theme}; switch`);
}

// Events -----------------------------------------------------------------------------------------------------------------
function onKey(event) {
  const field = event.target.closest?.("input, textarea, select, dialog");
  if (event.key === "Escape") {
    if (field) event.target.blur();
    else if (state.view === "latents" && state.latent >= 0) go({ view: "latents", latent: -1 });
    return;
  }
  if (field || event.altKey || event.ctrlKey || event.metaKey) return;
  const browser = browsers.get(state.sae)?.browser;
  const actions = {
    "/": () => state.view === "latents" && browser?.search.focus(),
    j: () => state.view === "latents" && browser?.move(1),
    k: () => state.view === "latents" && browser?.move(-1),
    n: () => document.getElementById("note")?.focus(),
    1: () => go({ view: "run", latent: -1 }),
    2: () => go({ view: "sae", latent: -1 }),
    3: () => go({ view: "latents", latent: browser?.current ?? -1 }),
    "?": showHelp,
  };
  if (run.prompt) actions[4] = () => go({ view: "prompt", latent: -1 });
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

function onPointerOver(event) {
  const token = event.target.closest?.(".tok");
  if (!token) {
    if (event.target.closest?.(".context")) hideTip();
    return;
  }
  const sae = run.saes.find(({ name }) => name === state.sae);
  const text = showToken(sae.text.vocabulary[Number(token.dataset.token)], 60);
  const value = token.dataset.value;
  showTip(event, [text, value ? `activation ${formatNumber(Number(value))}` : "does not fire"]);
}

function listen() {
  addEventListener("hashchange", render);
  addEventListener("keydown", onKey);
  addEventListener("scroll", hideTip, { passive: true });
  document.addEventListener("pointerover", onPointerOver);
  document.addEventListener("click", (event) => {
    const token = event.target.closest?.(".tok");
    if (token && getSelection().isCollapsed) go({ view: "latents", token: Number(token.dataset.token) });
    if (event.target.closest?.(".skip")) {
      event.preventDefault();
      document.getElementById("main").focus();
    }
  });
  document.addEventListener("pointerout", (event) => event.target.closest?.(".tok") && hideTip());
}

async function start() {
  manifest = await readJson("manifest");
  run = await readColumn("run");
  run.saes = run.saes.map((entry) => new Sae(entry));
  if (run.prompt) {
    VIEWS.prompt = "Prompt";
    KEYS.splice(5, 0, ["4", "prompt"], ["Ctrl Enter", "run the prompt"]);
  }
  notes.load();
  buildHeader();
  applyTheme(readStored("saetrain.theme", "auto"));
  showNoteCount();
  listen();
  await render();
  performance.mark("usable");
  document.documentElement.dataset.painted = "yes";
  // The rest of the data is decoded while the reader looks at the first view.
  const sae = run.saes.find(({ name }) => name === state.sae);
  if (sae.features) setTimeout(() => sae.loadDetails(), 200);
}

if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
else start();
