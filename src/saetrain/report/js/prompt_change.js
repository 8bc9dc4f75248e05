// What the model does differently when a latent is ablated or scaled.
class ChangePanel {
  constructor(view) {
    this.view = view;
    this.latent = h("input", { type: "number", min: "0", step: "1", "aria-label": "Number of the latent" });
    this.latent.addEventListener("change", () => this.chooseLatent());
    this.factor = h("input", { type: "number", step: "any", value: "3", "aria-label": "Factor" });
    this.where = h("select", { "aria-label": "Tokens on which the latent is changed" });
    this.target = h("select", { "aria-label": "Prediction that is compared" });
    this.ablate = h("button", { type: "button", onclick: () => this.measure(0) }, "Ablate");
    this.scale = h("button", { type: "button", onclick: () => this.measure(this.factor.valueAsNumber) }, "Scale by");
    this.about = h("p", { class: "change-about" });
    this.hint = h("p", { class: "note" });
    this.outcome = h("div", { class: "change-outcome", "aria-live": "polite" });
    for (const choice of [this.where, this.target]) choice.addEventListener("change", () => this.repeat());
    this.controls = h("div", { class: "change-controls" },
      h("div", { class: "row" }, this.ablate, h("span", { class: "row" }, this.scale, this.factor)),
      h("label", {}, h("span", {}, "on"), this.where),
      view.kind !== "none" && h("label", {}, h("span", {}, "compare"), this.target));
    this.element = h("section", { class: "prompt-change", "aria-label": "Change a latent" },
      h("h2", {}, h("label", {}, "Change latent ", this.latent)),
      this.about, this.hint, this.controls, this.outcome);
  }

  // Forget the outcome of an earlier prompt.
  reset() {
    this.ticket = null;
    this.done = null;
    this.outcome.replaceChildren();
    const { result, kind } = this.view;
    if (!result) return;
    const targets = kind === "causal" ? result.tokens.map((_, position) => position) : kind === "masked" ? result.masks : [];
    this.target.replaceChildren(...targets.map((position) => h("option", { value: position },
      kind === "causal" ? `the token after ${position} ${result.label(position)}` : `the token at ${position} ${result.label(position)}`)));
    if (kind === "causal") this.target.value = String(result.tokens.length - 1);
    this.hasTarget = kind === "none" || targets.length > 0;
  }

  draw() {
    const { latent, result, position, sae } = this.view;
    this.latent.max = String(sae.latents - 1);
    this.latent.value = latent >= 0 ? String(latent) : "";
    const chosen = this.where.value;
    this.where.replaceChildren(
      h("option", { value: "all" }, "all tokens that the SAE uses"),
      h("option", { value: position }, `token ${position} ${result.label(position)} only`));
    this.where.value = chosen && chosen !== "all" ? String(position) : "all";
    replaceContent(this.about, [
      latent >= 0 && sae.features && h("a", { href: permalink({ view: "latents", latent }) }, `Open latent ${latent}`),
      latent >= 0 && this.view.words(latent, 6)]);
    const hint = latent < 0 ? "Choose a latent in the list, or type its number." : !this.hasTarget ? "Mask a token first: the model predicts masked tokens only." : "";
    this.hint.replaceChildren(hint);
    this.hint.hidden = !hint;
    this.controls.hidden = hint !== "";
    if (this.done && this.done.latent !== latent) {
      this.done = null;
      this.outcome.replaceChildren();
    }
  }

  chooseLatent() {
    const latent = this.latent.valueAsNumber;
    if (Number.isInteger(latent) && latent >= 0 && latent < this.view.sae.latents) go({ view: "prompt", latent });
    else this.say(`Latents have the numbers 0 to ${this.view.sae.latents - 1}.`);
  }

  say(text) {
    this.outcome.replaceChildren(h("p", { class: "note" }, text));
  }

  // Measure the last change again, for other tokens or another prediction.
  repeat() {
    if (this.done) this.measure(this.done.scale);
  }

  async measure(scale) {
    if (!isNumber(scale)) {
      this.say("Type a number by which the latent's activation is multiplied.");
      return;
    }
    const ticket = (this.ticket = {});
    const { latent, kind } = this.view;
    const only = this.where.value === "all" ? null : Number(this.where.value);
    const position = kind === "none" ? null : Number(this.target.value);
    this.say("Running …");
    try {
      const found = await callServer(this.view.run, "change", { ...this.view.request(), latent, scale, only, position });
      if (ticket !== this.ticket) return;
      this.done = { latent, scale };
      this.show(found, position);
    } catch (error) {
      if (ticket === this.ticket) this.say(error.message);
    }
  }

  show(found, position) {
    const { latent, scale } = this.done, { result, kind } = this.view;
    const done = scale === 0 ? `Latent ${latent} ablated` : `Latent ${latent} times ${formatShort(scale)}`;
    const tokens = `${formatCount(found.tokens)} token${found.tokens === 1 ? "" : "s"}`;
    if (!found.fires_on) {
      this.say(`${done}: it fires on none of the ${tokens}, so nothing changes.`);
      return;
    }
    const where = kind === "causal" ? `after ${result.label(position)}` : kind === "masked" ? `at position ${position}` : "";
    const size = kind === "none"
      ? `The final hidden states change by ${formatShare(found.relative_change)} of their norm.`
      : `The probabilities ${where} change by a KL divergence of ${formatNumber(found.kl, 3)} nats.`;
    replaceContent(this.outcome, [
      h("p", { class: "change-summary" }, h("b", {}, done), ` on ${formatCount(found.fires_on)} of ${tokens}. ${size}`),
      kind === "none" ? this.showStates(found.changes) : this.showProbabilities(found.changes)]);
  }

  showProbabilities(changes) {
    const largest = Math.max(...changes.flatMap(({ before, after }) => [before, after]));
    const bar = (value, name) => setStyle(h("span", { class: name }), { "--share": largest ? value / largest : 0 });
    return h("table", { class: "change-table" },
      h("thead", {}, h("tr", {}, ["token", "before", "after", "change (points)"].map((text) => h("th", { scope: "col" }, text)), h("td", { class: "bars", "aria-hidden": "true" }))),
      h("tbody", {}, changes.map(({ token, before, after }) => h("tr", {},
        h("th", { scope: "row" }, h("span", { class: "word" }, tokenParts(token, 20))),
        h("td", {}, formatShare(before)), h("td", {}, formatShare(after)),
        h("td", { class: "strong" }, `${after > before ? "+" : ""}${formatShare(after - before).replace(" %", "")}`),
        h("td", { class: "bars", "aria-hidden": "true" }, bar(before, "bar-before"), bar(after, "bar-after"))))));
  }

  showStates(changes) {
    const largest = Math.max(...changes.map(({ change }) => change));
    return [h("h2", {}, "Tokens that change most", h("small", {}, "relative to their norm")), h("ol", { class: "table-list" }, changes.map(({ position, change }) => setStyle(h("li", { class: "with-bar" },
      h("span", { class: "word" }, `${position} ${this.view.result.label(position, 32)}`),
      h("span", { class: "value" }, formatShare(change))), { "--share": largest ? change / largest : 0 })))];
  }
}
