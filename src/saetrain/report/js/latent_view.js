// One latent: contexts by band, tokens, histogram, logit lens, relatives, positions, and a note.
const LENS_TITLES = {
  causal: ["Promotes as next token", "Suppresses as next token"],
  masked: ["Promotes at a masked token", "Suppresses at a masked token"],
  none: ["", ""],
  embedding: ["Nearest input embeddings", "Farthest input embeddings"],
};

const EFFECTS = {
  ce_increase: ["cross-entropy rises by", " nats"],
  kl: ["KL divergence", " nats"],
  final_hidden_error: ["final states change by", " of their size"],
};

async function showLatent(run, sae, latent, browser) {
  await sae.loadDetails();
  const note = h("textarea", { id: "note", rows: "1", placeholder: "What does this latent stand for?", "aria-label": `Note on latent ${latent}` });
  note.value = notes.read(sae.name, latent);
  note.addEventListener("input", () => notes.write(sae.name, latent, note.value));
  note.addEventListener("change", () => browser.draw());
  return h("article", { class: "latent" },
    h("header", { class: "latent-head" },
      h("a", { class: "back", href: permalink({ view: "latents", latent: -1 }) }, "← Latents"),
      h("h1", {}, `Latent ${latent}`),
      h("div", { class: "actions" },
        h("button", { type: "button", onclick: () => browser.move(-1), title: "Previous in the list (k)" }, "Previous"),
        h("button", { type: "button", onclick: () => browser.move(1), title: "Next in the list (j)" }, "Next"),
        run.prompt && h("button", { type: "button", onclick: () => go({ view: "prompt", latent }) }, "Try a prompt"),
        h("button", { type: "button", onclick: () => copyText(location.href, "Link") }, "Copy link"),
        h("button", { type: "button", onclick: () => copyText(JSON.stringify(sae.describe(latent), null, 1), "JSON") }, "Copy JSON"))),
    showStats(sae, latent),
    note,
    h("div", { class: "columns" },
      h("div", { class: "contexts" }, showContexts(sae, latent)),
      h("div", { class: "side" }, showSide(sae, latent))));
}

function showStats(sae, latent) {
  const count = sae.count[latent];
  const stats = [
    ["fires on", formatShare(sae.rate(latent)), `${formatCount(count)} tokens`],
    ["largest", formatNumber(sae.max[latent]), `mean ${formatNumber(sae.mean_active[latent])}`],
    ["variance explained", formatShare(sae.variance_explained[latent]), "by this latent alone"],
    ["purity", count ? formatShare(sae.purity[latent]) : "–", count ? `entropy ${formatFixed(sae.entropy[latent], 2)} bits` : ""],
    ["encoder · decoder", formatFixed(sae.encoder_decoder_cosine[latent], 2), "cosine"],
  ];
  const effect = sae.loss_effect?.[latent];
  if (isNumber(effect)) {
    const [low, high] = [sae.loss_effect_low?.[latent], sae.loss_effect_high?.[latent]];
    const [name, unit] = EFFECTS[sae.features.metadata.loss] ?? ["loss effect", ""];
    stats.push([name, `${formatNumber(effect, 2)}${unit}`, `if ablated${isNumber(low) ? `; ${formatNumber(low, 2)} to ${formatNumber(high, 2)}` : ""}`]);
  }
  return h("dl", { class: "facts small" }, stats.map(([name, value, detail]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, h("small", {}, detail)))));
}

// Contexts ------------------------------------------------------------------------------------------------------------------
function showContexts(sae, latent) {
  const contexts = sae.contextsOf(latent);
  if (!contexts.length) return h("p", { class: "empty" }, `This latent fires on none of the ${formatCount(sae.features.tokens)} tokens that were read.`);
  return BAND_NAMES.map((name, band) => {
    const own = contexts.filter((context) => context.band === band);
    if (!own.length) return "";
    const values = own.map((context) => context.value);
    const [low, high] = [Math.min(...values), Math.max(...values)].map((value) => formatNumber(value));
    return h("section", { class: "band" },
      h("h2", {}, name, h("small", {}, low === high ? low : `${low} to ${high}`)),
      h("ol", {}, own.map((context) => showContext(sae, latent, context))));
  });
}

function showContext(sae, latent, { row, start, value, activations }) {
  const text = sae.text;
  const pieces = Array.from(activations, (activation, i) => {
    const number = text.token[start + i];
    const previous = i > 0 || !(text.flags[start] & SEQUENCE_START);
    const shown = shorten(text.join(number, previous), 60);
    const space = /^ */.exec(shown)[0];
    const token = h("span", { class: activation ? "tok on" : "tok", "data-token": number, "data-value": activation || null }, shown.slice(space.length) || space);
    if (activation) setStyle(token, { "--on": `${Math.round(12 + 58 * Math.sqrt(Math.abs(activation) / sae.max[latent]))}%` });
    if (text.flags[start + i] & EXCLUDED) token.classList.add("excluded");
    const isStart = i > 0 && (text.flags[start + i] & DOCUMENT_START) !== 0;
    return [isStart && h("span", { class: "cut", title: "start of a document" }, " ‖ "), i > 0 && space !== shown && space, token];
  });
  const at = row - start;
  pieces[at].at(-1).classList.add("centre");
  const position = text.sequencePosition(row);
  return h("li", { class: "context" },
    h("span", { class: "value", title: `document ${text.document(row)}, position ${position}` }, formatNumber(value)),
    h("span", { class: "line" },
      h("span", { class: "before" }, h("bdi", { dir: "ltr" }, pieces.slice(0, at))),
      h("span", { class: "after" }, pieces.slice(at))));
}

// Side column ------------------------------------------------------------------------------------------------------------------
function showSide(sae, latent) {
  const count = sae.count[latent];
  const lens = LENS_TITLES[sae.features.metadata.lens] ?? LENS_TITLES.causal;
  return [
    count > 0 && showTokens(sae, latent),
    count > 0 && showHistogram(sae, latent),
    showLens(sae, latent, "lens_top", lens[0]),
    showLens(sae, latent, "lens_bottom", lens[1]),
    showRelatives(sae, latent, "neighbours", "neighbour_cosines", "Nearest decoder rows", (value) => formatFixed(value, 2), "cosine"),
    showRelatives(sae, latent, "cofiring", "cofiring_lift", "Fires together with", (value) => `${formatNumber(value, 2)} ×`, "times as often as by chance"),
    count > 0 && showPositions(sae, latent),
  ];
}

function tokenButton(sae, number) {
  const text = sae.text.vocabulary[number];
  return h("button", { type: "button", class: "token", title: "List the latents that fire on this token", onclick: () => go({ view: "latents", token: number }) }, tokenParts(text, 22));
}

function showTokens(sae, latent) {
  const tokens = sae.topTokens(latent);
  return h("section", {}, h("h2", {}, "Fires on", h("small", {}, "share of its firings")),
    h("ol", { class: "table-list" }, tokens.map(({ token, count }) => {
      const share = count / sae.count[latent];
      return setStyle(h("li", { class: "with-bar" }, tokenButton(sae, token), h("span", { class: "value" }, formatShare(share))), { "--share": share });
    })));
}

function showHistogram(sae, latent) {
  const counts = sae.row("histogram", latent, 32), largest = sae.max[latent];
  const bars = counts.map((value, i) => ({ low: (i * largest) / 32, high: ((i + 1) * largest) / 32, value, label: `activation ${formatNumber((i * largest) / 32)} to ${formatNumber(((i + 1) * largest) / 32)}` }));
  return barFigure({ title: "Activations", yLabel: "tokens", xLabel: "activation", bars, height: 150, format: (value) => `${formatCount(value)} tokens`, className: "small" });
}

function showPositions(sae, latent) {
  const counts = sae.row("positions", latent, 16);
  const bars = counts.map((value, i) => ({ low: i / 16, high: (i + 1) / 16, value, label: `${formatShare(i / 16)} to ${formatShare((i + 1) / 16)} of the sequence` }));
  return barFigure({ title: "Positions", yLabel: "tokens", xLabel: "relative position in the sequence", bars, height: 130, format: (value) => `${formatCount(value)} tokens`, controls: false, className: "small" });
}

function showLens(sae, latent, name, title) {
  const found = sae.pairs(latent, name, `${name}_logits`);
  if (!found.length) return "";
  const isEmbedding = sae.features.metadata.lens === "embedding";
  return h("section", {}, h("h2", {}, title, h("small", {}, isEmbedding ? "cosine" : "logit")),
    h("ol", { class: "table-list" }, found.map(({ item, value }) => h("li", {}, tokenButton(sae, item), h("span", { class: "value" }, formatFixed(value, 2))))));
}

function showRelatives(sae, latent, name, values, title, format, unit) {
  const found = sae.pairs(latent, name, values);
  if (!found.length) return "";
  return h("section", {}, h("h2", {}, title, h("small", {}, unit)),
    h("ol", { class: "table-list" }, found.map(({ item, value }) => h("li", {},
      h("a", { href: permalink({ view: "latents", latent: item }), title: describeLatent(sae, item).join(", ") }, h("span", { class: "number" }, String(item)),
        h("span", { class: "words" }, sae.topTokens(item).slice(0, 3).map(({ token }) => h("span", { class: "word" }, tokenParts(sae.text.vocabulary[token], 12))))),
      h("span", { class: "value" }, format(value))))));
}
