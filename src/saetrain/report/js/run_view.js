// The run: what was trained on what, the verdict, held-out metrics next to baselines, and training curves.
const CHECKS = {
  explained_variance: "Explained variance",
  l0: "L0",
  dead: "Dead latents",
  redundancy: "Decoder redundancy",
};
const METRIC_NAMES = {
  explained_variance: "explained variance",
  fvu: "FVU",
  mse: "mean squared error",
  cosine: "cosine",
  norm_ratio: "norm ratio",
  reconstruction_bias: "reconstruction bias",
  l0: "L0",
  l0_share: "L0 / latents",
  alive: "alive",
  dead_below_threshold: "dead by rate",
  dead_never_fired: "never fired",
  "dead_below_1e-5": "fire on less than 1 in 100,000 tokens",
  density_over_1_percent: "fire on more than 1 %",
  density_over_10_percent: "fire on more than 10 %",
  decoder_redundancy_top100: "decoder redundancy, 100 closest pairs",
  decoder_max_cosine: "cosine with the nearest decoder row",
  encoder_decoder_cosine: "cosine of encoder and decoder",
  ce_clean: "cross-entropy of the model (nats)",
  ce_spliced: "cross-entropy with the SAE (nats)",
  delta_ce: "cross-entropy increase (nats)",
  ce_zero: "cross-entropy, zero ablation (nats)",
  ce_mean: "cross-entropy, mean ablation (nats)",
  ce_recovered_zero: "loss recovered (zero)",
  ce_recovered_mean: "loss recovered (mean)",
  kl: "KL divergence (nats)",
  pooled_cosine: "pooled cosine",
  final_hidden_error: "final hidden error",
};
const MAIN_METRICS = [
  "explained_variance", "cosine", "l0", "dead_below_threshold", "dead_never_fired", "decoder_redundancy_top100",
  "encoder_decoder_cosine", "delta_ce", "ce_recovered_zero", "kl", "pooled_cosine", "final_hidden_error",
];
const SHARES = /^(alive|dead|density_|l0_share)/;
const CURVES = [
  ["loss", "Loss", "training loss", true],
  ["fvu", "FVU", "fraction of variance unexplained", true],
  ["l0", "L0", "active latents per token", false],
  ["dead", "Dead latents", "share of latents", false],
  ["lr", "Learning rate", "per step", false],
];

function formatMetric(name, value) {
  if (!isNumber(value)) return "–";
  if (SHARES.test(name)) return formatShare(value);
  return name === "l0" || Math.abs(value) >= 10 ? formatFixed(value, 1) : formatFixed(value, 3);
}

function showRun(run, state) {
  const sae = run.saes.find((found) => found.name === state.sae) ?? run.saes[0];
  return h(
    "div",
    { class: "page" },
    h("h1", {}, shorten(run.name, 80)),
    h("p", { class: "lead" }, ...describeRun(run)),
    describeFacts(run, sae),
    ...(run.assessment ? showVerdicts(run, sae) : [h("p", { class: "empty" }, "This run has no verdict. Run `saetrain evaluate` on it.")]),
    showComparison(run, sae),
    ...run.evaluations.map((found) => showEvaluation(run, found, sae)),
    showCurves(run, sae),
    showSettings(run),
  );
}

function listNames(value) {
  const names = [value].flat().map((name) => shorten(lastPart(name), 60));
  return names.length > 3 ? `${names.slice(0, 3).join(", ")} and ${names.length - 3} more` : names.join(", ");
}

function describeRun(run) {
  const first = run.saes[0];
  const count = run.saes.length;
  const sizes = [...new Set(run.saes.map((sae) => sae.latents))].sort((a, b) => a - b);
  const places = [...new Set(run.saes.map((sae) => sae.hookpoint))];
  const model = run.settings.model ?? first.metadata.model ?? "an unknown model";
  const data = run.settings.dataset ?? first.metadata.dataset;
  return [
    count === 1 ? "One SAE" : `${formatCount(count)} SAEs`,
    sizes.length > 1 ? ` with ${formatCount(sizes[0])} to ${formatCount(sizes.at(-1))} latents on ` : ` with ${formatCount(first.latents)} latents on `,
    places.length === 1 ? h("b", {}, shorten(places[0], 60)) : `${places.length} hookpoints`,
    " of ",
    h("b", { title: model }, shorten(lastPart(model), 60)),
    data ? [", trained on ", h("b", {}, listNames(data))] : "",
    ".",
  ];
}

function describeFacts(run, sae) {
  const metadata = sae.metadata;
  const tokens = metadata.tokens_seen ?? run.curves.train.tokens.at(-1);
  const seconds = run.train_seconds;
  const facts = [
    ["Training tokens", formatCount(tokens), metadata.steps ? `${formatCount(metadata.steps)} steps` : ""],
    ["Training time", formatDuration(seconds), seconds > 0 && tokens ? `${formatCount(tokens / seconds)} tokens/s` : ""],
    ["Architecture", sae.architecture, isNumber(sae.expected_l0) ? `L0 of ${formatShort(sae.expected_l0)}` : ""],
    ["Width", formatCount(sae.d_in), `${formatShort(sae.latents / sae.d_in)} latents per dimension`],
    ["Context", isNumber(metadata.ctx_len) ? formatCount(metadata.ctx_len) : "–", "tokens per sequence"],
  ];
  return h("dl", { class: "facts" }, facts.map(([name, value, detail]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, value, detail && h("small", {}, detail)))));
}

// Verdict -----------------------------------------------------------------------------------------------------------------
function showVerdicts(run, sae) {
  const { saes, judged_on: judged } = run.assessment;
  const found = saes[sae.name];
  const where = `Judged on ${listNames(judged?.data_set ?? "held-out text")} (${judged?.in_sample ? "in-sample" : "out of sample"}): ${judged?.held_out ?? ""}.`;
  return [
    h("h2", {}, "Verdict"),
    h("p", { class: "note" }, where),
    run.saes.length > 1 && showVerdictTable(run, sae, saes),
    found ? showVerdict(found) : h("p", { class: "empty" }, `There is no verdict on ${sae.name}.`),
  ];
}

function showVerdictTable(run, sae, saes) {
  const names = Object.keys(CHECKS);
  const rows = run.saes.filter(({ name }) => saes[name]).map(({ name }) =>
    h("tr", { class: name === sae.name ? "current" : "" },
      h("th", { scope: "row" }, h("a", { href: permalink({ sae: name }) }, shorten(name, 40))),
      h("td", {}, saes[name].verdict),
      names.map((check) => {
        const judgment = saes[name].metrics[check];
        return h("td", {}, badge(judgment.status, ""), formatMetric(check, judgment.value));
      })));
  const head = h("tr", {}, h("th", { scope: "col" }, "SAE"), h("th", { scope: "col" }, "passed"), names.map((name) => h("th", { scope: "col" }, CHECKS[name])));
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, head), h("tbody", {}, rows)));
}

function badge(status, text = status) {
  const mark = { good: "●", pass: "●", fail: "○" }[status] ?? "·";
  return h("span", { class: `badge ${["good", "pass", "fail"].includes(status) ? status : ""}` }, h("span", { "aria-hidden": text ? "true" : null, "aria-label": text ? null : status, role: text ? null : "img" }, mark), text && ` ${text}`);
}

function showVerdict(found) {
  return h("div", { class: "checks" }, Object.entries(found.metrics).map(([name, judgment]) => {
    const hasInterval = isNumber(judgment.low) && judgment.low < judgment.high;
    return h("section", { class: "check" },
      h("h3", {}, CHECKS[name] ?? name, badge(judgment.status, judgment.status + (judgment.by_construction ? ", by construction" : ""))),
      h("p", { class: "big" }, formatMetric(name, judgment.value), hasInterval && h("small", {}, formatInterval(name, judgment))),
      h("p", { class: "threshold" }, `Threshold: ${judgment.threshold}`),
      h("p", {}, sentence(judgment.reason)),
      judgment.advice && h("p", { class: "advice" }, sentence(judgment.advice)));
  }));
}

function sentence(text) {
  const shown = String(text);
  return `${shown.charAt(0).toUpperCase()}${shown.slice(1)}${/[.!?]$/.test(shown) ? "" : "."}`;
}

function formatInterval(name, { low, high }) {
  return isNumber(low) && isNumber(high) && low < high ? `${formatMetric(name, low)} to ${formatMetric(name, high)}` : "";
}

// Held-out metrics ----------------------------------------------------------------------------------------------------------
function showEvaluation(run, evaluation, sae) {
  const found = evaluation.saes?.[sae.name];
  if (!found) return "";
  const all = Object.keys(found.figures);
  const main = all.filter((name) => MAIN_METRICS.includes(name)).sort((a, b) => MAIN_METRICS.indexOf(a) - MAIN_METRICS.indexOf(b));
  const rest = all.filter((name) => !main.includes(name));
  const baselines = [...new Set(Object.values(found.figures).flatMap((metric) => Object.keys(metric.nulls ?? {})))];
  const table = (names) => h("div", { class: "scroll" }, h("table", { class: "metrics" },
    h("thead", {}, h("tr", {}, ["metric", "value", "95 % interval", ...baselines.map((name) => run.baseline_names[name] ?? name)].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, names.map((name) => {
      const metric = found.figures[name];
      return h("tr", {},
        h("th", { scope: "row" }, METRIC_NAMES[name] ?? name.replaceAll("_", " "), metric.flag && h("span", { class: "flag" }, metric.flag)),
        h("td", { class: "strong" }, formatMetric(name, metric.value)),
        h("td", { class: "interval" }, formatInterval(name, metric)),
        baselines.map((baseline) => h("td", {}, metric.nulls?.[baseline] ? formatMetric(name, metric.nulls[baseline].value) : "")));
    }))));
  return h("section", {},
    h("h2", {}, "Held-out metrics"),
    h("p", { class: "note" }, `${sae.name} on ${listNames(evaluation.data_set)} (${evaluation.in_sample ? "in-sample" : "out of sample"}), ${formatCount(found.figures.fvu?.count)} tokens of ${formatCount(found.documents)} documents. Baselines have as many active values per token.`),
    table(main),
    rest.length > 0 && h("details", {}, h("summary", {}, rest.length === 1 ? "1 more metric" : `${rest.length} more metrics`), table(rest)));
}

// Curves --------------------------------------------------------------------------------------------------------------------
function showCurves(run, sae) {
  const { train, eval: held } = run.curves;
  if (!train.step.length) return "";
  const names = Object.keys(train.saes).sort((a, b) => (a === sae.name) - (b === sae.name));
  const classOf = (name) => (name === sae.name ? "accent" : "muted");
  const figures = CURVES.map(([metric, title, unit, log]) => {
    const series = [];
    for (const name of names) {
      if (metric === "dead") {
        const key = train.saes[name].dead_below_threshold ? "dead_below_threshold" : "dead_not_fired";
        if (train.saes[name][key]) series.push({ name, x: train.tokens, y: train.saes[name][key], className: classOf(name) });
      } else if (train.saes[name][metric]) {
        series.push({ name, x: train.tokens, y: train.saes[name][metric], className: classOf(name) });
      }
    }
    if (metric === "fvu") {
      for (const name of names.filter((found) => held.saes[found]?.fvu)) {
        series.push({ name: `${name}, held out`, x: held.tokens, y: held.saes[name].fvu, className: classOf(name), dots: true });
      }
    }
    return series.length && lineFigure({
      title, yLabel: unit, xLabel: "training tokens", series, logY: log, format: metric === "dead" ? formatShare : formatNumber,
    });
  }).filter(Boolean);
  figures.push(lineFigure({
    title: "Speed", yLabel: "training tokens per second", xLabel: "training tokens", format: formatCount,
    series: [{ name: "tokens per second", x: train.tokens, y: train.tokens_per_second, className: "accent" }],
  }));
  return h("section", {},
    h("h2", {}, "Training curves"),
    h("div", { class: "bar-of-controls" },
      h("p", { class: "note" }, names.length > 1 ? `${sae.name} in colour, the other SAEs in grey.` : "", " Dots: FVU on held-out text."),
      h("span", { class: "labelled" }, "Token axis", makeSwitch("Token axis", [[false, "linear"], [true, "log"]], false, (value) => figures.forEach((figure) => figure.setLogX(value))))),
    h("div", { class: "charts" }, figures));
}

function showSettings(run) {
  const shown = Object.entries(run.settings).filter(([, value]) => value !== null);
  if (!shown.length) return "";
  const text = (value) => (Array.isArray(value) && typeof value[0] !== "object" ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value));
  return h("section", {},
    h("h2", {}, "Settings"),
    h("details", {}, h("summary", {}, `${shown.length} settings of config.yaml`),
      h("dl", { class: "settings" }, shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, shorten(text(value), 300)))))),
    h("p", { class: "note" }, `Report of saetrain ${run.saetrain}.`));
}
