// One SAE as a whole: firing rates, reconstruction by class of tokens, and the geometry of its decoder.
const CLASS_NAMES = {
  kept: "kept tokens",
  special: "special tokens",
  first: "position 0",
  outlier: "norm outliers",
  all: "all tokens",
};
const RATE_STEP = 0.25; // Decades per bar of the histogram of firing rates.

async function showSae(run, sae) {
  const evaluation = run.evaluations.find((found) => found.saes?.[sae.name])?.saes[sae.name];
  if (sae.features) await sae.load();
  const points = await readColumn(`${sae.prefix}.map`);
  return h(
    "div",
    { class: "page" },
    h("h1", {}, shorten(sae.name, 80)),
    h("p", { class: "lead" }, `${formatCount(sae.latents)} latents, ${formatCount(sae.d_in)} dimensions, ${sae.architecture}.`, sae.features ? ` ${describeCollection(sae)}` : ""),
    h("div", { class: "charts wide" },
      sae.features ? showRates(sae) : evaluation?.density && showDensity(evaluation.density),
      showNearestCosines(sae),
      sae.features && showEncoderCosines(sae),
      evaluation?.frequency && showFrequencies(evaluation.frequency),
      evaluation && showClasses(evaluation.classes)),
    showMap(sae, points),
    sae.stability && showStability(sae.stability),
  );
}

function describeCollection(sae) {
  const { metadata, tokens } = sae.features;
  const part = { held_out: "held-out", training: "training", other: "other" }[metadata.text];
  return `Firings were counted on ${formatCount(tokens)} tokens${part ? ` of ${part} text` : ""}.`;
}

function showRates(sae) {
  const tokens = sae.features.tokens;
  const lowest = Math.floor(Math.log10(1 / tokens) / RATE_STEP) * RATE_STEP;
  const counts = new Array(Math.ceil(-lowest / RATE_STEP)).fill(0);
  let never = 0;
  for (const count of sae.count) {
    if (!count) never += 1;
    else counts[Math.min(counts.length - 1, Math.floor((Math.log10(count / tokens) - lowest) / RATE_STEP + 1e-9))] += 1;
  }
  return rateFigure(counts.map((value, i) => ({ low: lowest + i * RATE_STEP, high: lowest + (i + 1) * RATE_STEP, value })), never,
    `${formatCount(never)} of ${formatCount(sae.latents)} latents fire on none of ${formatCount(tokens)} tokens.`);
}

function showDensity({ edges_log10: edges, counts, never, rarer }) {
  const bars = counts.map((value, i) => ({ low: edges[i], high: edges[i + 1], value }));
  return rateFigure(bars, never, rarer ? `${formatCount(rarer)} latents fire more rarely than the first bar.` : "Measured on the held-out text of the verdict.");
}

function rateFigure(bars, never, note) {
  for (const bar of bars) bar.label = `rate ${formatShare(10 ** bar.low)} to ${formatShare(10 ** bar.high)}`;
  const ticks = [];
  for (let power = Math.ceil(bars[0].low); power <= 0; power++) ticks.push(power);
  return barFigure({
    title: "Firing rates", yLabel: "latents", xLabel: "share of tokens on which a latent fires (log scale)", bars,
    zero: { value: never, label: "never fire" }, xTicks: ticks, xFormat: formatPower, note, format: (value) => `${formatCount(value)} latents`,
  });
}

function showNearestCosines(sae) {
  const { edges, decoder, random, rows } = sae.nearest_cosines;
  const bars = decoder.map((value, i) => ({ low: edges[i], high: edges[i + 1], value, label: `cosine ${formatFixed(edges[i], 2)} to ${formatFixed(edges[i + 1], 2)}` }));
  const of = rows < sae.latents ? `${formatCount(rows)} evenly spaced rows` : "all rows";
  return barFigure({
    title: "Nearest decoder row", yLabel: "share of latents", xLabel: "cosine with the nearest other row", bars, outline: random,
    format: formatShare, note: `Bars: ${of}. Line: expected of ${formatCount(sae.latents)} random directions.`,
  });
}

function showEncoderCosines(sae) {
  const values = Array.from(sae.encoder_decoder_cosine).filter((_, i) => sae.count[i] > 0);
  const bins = new Array(40).fill(0);
  for (const value of values) bins[Math.min(39, Math.max(0, Math.floor((value + 1) * 20)))] += 1;
  const first = Math.max(0, bins.findIndex((count) => count) - 1);
  return barFigure({
    title: "Encoder and decoder", yLabel: "latents", xLabel: "cosine between a latent's encoder and decoder", format: (value) => `${formatCount(value)} latents`,
    bars: bins.slice(first).map((value, i) => ({ low: (first + i) / 20 - 1, high: (first + i + 1) / 20 - 1, value, label: `cosine ${formatFixed((first + i) / 20 - 1, 2)} to ${formatFixed((first + i + 1) / 20 - 1, 2)}` })),
    note: "Latents that fire. A low cosine means that what a latent reads and what it writes differ.",
  });
}

function showClasses(classes) {
  const entries = Object.entries(classes ?? {}).filter(([, found]) => found.tokens > 0 && isNumber(found.fvu));
  if (!entries.length) return "";
  return h("figure", { class: "chart" },
    h("figcaption", {}, h("span", { class: "chart-title" }, "FVU by class of tokens"), h("span", { class: "unit" }, "fraction of variance unexplained")),
    h("div", { class: "scroll" }, h("table", { class: "metrics" },
      h("thead", {}, h("tr", {}, ["class", "tokens", "FVU", "cosine", "norm ratio"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, entries.map(([name, found]) => h("tr", {},
        h("th", { scope: "row" }, CLASS_NAMES[name] ?? name),
        h("td", {}, formatCount(found.tokens)),
        h("td", { class: "strong" }, formatFixed(found.fvu, 3)),
        h("td", {}, formatFixed(found.cosine, 3)),
        h("td", {}, formatFixed(found.norm_ratio, 3))))))),
    h("p", { class: "note" }, "Each class is centred by its own mean. Other metrics count kept tokens only."));
}

// FVU of frequent and of rare tokens: a bin holds the tokens whose share of the text is within its edges.
function showFrequencies({ edges_log10: edges, tokens, fvu }) {
  const used = tokens.map((count, i) => i).filter((i) => tokens[i] > 0);
  if (!used.length) return "";
  const [first, last] = [used[0], used[used.length - 1]];
  const bars = [], ticks = [];
  for (let i = first; i <= last; i++) {
    const range = `tokens that are ${formatShare(10 ** edges[i])} to ${formatShare(10 ** edges[i + 1])} of the text`;
    bars.push({ low: edges[i], high: edges[i + 1], value: fvu[i] ?? 0, label: `${range} (${formatCount(tokens[i])} evaluated)` });
  }
  for (let power = Math.ceil(edges[first]); power <= edges[last + 1]; power++) ticks.push(power);
  return barFigure({
    title: "FVU by token frequency", yLabel: "fraction of variance unexplained", xLabel: "share of the text that is the same token (log scale)",
    bars, xTicks: ticks, xFormat: formatPower, format: (value) => `FVU ${formatFixed(value, 3)}`,
    note: "Left: rare tokens. Right: frequent tokens. Kept tokens of held-out text; each bar is centred by its own mean.",
  });
}

function showMap(sae, points) {
  const logRate = (i) => (sae.count[i] ? Math.min(1, Math.max(0, 1 + Math.log10(sae.rate(i)) / 5)) : -1);
  const shares = sae.map_shares.map(formatShare);
  return h("section", {},
    h("h2", {}, "Map of the decoder"),
    mapFigure({
      title: "First two principal components of the decoder rows",
      label: `Map of ${sae.latents} decoder rows. The list of latents has the same entries for keyboards and screen readers.`,
      note: `Each point is a latent; click one to open it. Rows have unit norm and are centred. The axes have no unit: component 1 (horizontal) has ${shares[0]} of the variance, component 2 (vertical) ${shares[1] ?? "0 %"}, so near points need not be similar.${sae.features ? " Points of a stronger colour fire more often; grey points never fire." : ""}`,
      points, colors: sae.features ? logRate : null,
      describe: (latent) => describeLatent(sae, latent),
      onPick: (latent) => sae.features && go({ view: "latents", latent }),
    }));
}

function describeLatent(sae, latent) {
  if (!sae.features) return [`latent ${latent}`];
  const words = sae.topTokens(latent).slice(0, 4).map(({ token }) => showToken(sae.text.vocabulary[token], 16));
  return [`latent ${latent}`, `fires on ${formatShare(sae.rate(latent))} of tokens`, words.join("  ")].filter(Boolean);
}

function showStability({ edges, counts, seeds }) {
  return h("section", {}, h("h2", {}, "Stability over seeds"), barFigure({
    title: "Cosine with the best match in another seed", yLabel: "latents", xLabel: "cosine", note: `Seeds: ${seeds.join(", ")}.`,
    bars: counts.map((value, i) => ({ low: edges[i], high: edges[i + 1], value, label: `cosine ${formatFixed(edges[i], 2)} to ${formatFixed(edges[i + 1], 2)}` })),
  }));
}
