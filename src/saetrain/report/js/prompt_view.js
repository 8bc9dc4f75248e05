// A prompt, which the server runs: its tokens, the latents that fire on each, and what the model predicts.
const SHOWN_LATENTS = 30, SHOWN_ON_NARROW = 8; // Rows of the list before a button shows the rest.
const PROMPT_KEY = "saetrain.prompt";

function replaceContent(element, children) {
  element.replaceChildren();
  fillElement(element, {}, children);
}

// The answer of the server to a call; an error has a text for the reader.
async function callServer(run, name, body) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(`${run.prompt.api}/${name}`, options);
  } catch {
    throw new Error("The server does not answer. Start saetrain explore again, and open the address that it prints.");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `The server failed (${answer.status}); its terminal shows why.`);
  return found;
}

// What the server answered on a prompt, by token.
class PromptResult {
  constructor(answer) {
    Object.assign(this, answer);
    this.starts = sumLengths(this.shown);
  }

  // The latents that fire on a token, the strongest first.
  latentsOn(position) {
    const found = [];
    for (let i = this.starts[position]; i < this.starts[position + 1]; i++) found.push({ latent: this.latents[i], value: this.values[i] });
    return found;
  }

  activations(latent) {
    return this.tokens.map((_, position) => this.latentsOn(position).find((pair) => pair.latent === latent)?.value ?? 0);
  }

  label(position, length = 16) {
    return `‹${showToken(this.tokens[position].trim() || this.tokens[position], length)}›`;
  }

  get masks() {
    return this.tokens.map((_, position) => position).filter((position) => this.is_mask[position]);
  }
}

class PromptView {
  constructor(run) {
    Object.assign(this, { run, sae: null, latent: -1, result: null, position: -1, masked: null, asked: "" });
    this.kind = run.prompt.kind;
    const example = this.kind === "masked" ? `The capital of France is ${run.prompt.mask_token}.` : "The capital of France is";
    this.text = h("textarea", { id: "prompt", rows: "3", placeholder: example, "aria-label": "Prompt", spellcheck: "false", autocomplete: "off" });
    this.text.value = readStored(PROMPT_KEY, "", "sessionStorage");
    this.button = h("button", { type: "button", class: "main", onclick: () => this.start() }, "Run");
    this.status = h("p", { class: "note prompt-status", role: "status" });
    this.tokens = h("div", { class: "prompt-tokens", role: "listbox", "aria-label": "Tokens", "aria-orientation": "horizontal", hidden: true });
    this.firing = h("section", { class: "prompt-firing", "aria-label": "Latents on the token" });
    this.predicted = h("section", { class: "prompt-predicted", "aria-label": "Predictions" });
    this.change = new ChangePanel(this);
    this.columns = h("div", { class: "prompt-columns", hidden: true }, this.firing, h("div", { class: "prompt-side" }, this.change.element, this.predicted));
    this.element = h("div", { class: "page prompt-page" },
      h("h1", {}, "Prompt"),
      h("p", { class: "lead" }, "Run the model on a text of your own: see which latents fire on each token, and what changes when you ablate or scale one."),
      this.text,
      h("div", { class: "prompt-bar" }, this.button, h("kbd", {}, "Ctrl Enter"), this.status),
      this.tokens, this.columns);
    this.listen();
  }

  listen() {
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.start();
    });
    this.tokens.addEventListener("click", (event) => {
      const token = event.target.closest("[data-position]");
      if (token) this.select(Number(token.dataset.position));
    });
    this.tokens.addEventListener("keydown", (event) => {
      const last = this.result.tokens.length - 1;
      const wanted = { ArrowLeft: this.position - 1, ArrowRight: this.position + 1, Home: 0, End: last }[event.key];
      if (wanted === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.select(Math.min(last, Math.max(0, wanted)));
      this.tokens.querySelector('[aria-selected="true"]').focus();
    });
    this.tokens.addEventListener("pointerover", (event) => {
      const token = event.target.closest("[data-position]");
      if (token) showTip(event, this.describeToken(Number(token.dataset.position)));
      else hideTip();
    });
    this.tokens.addEventListener("pointerleave", hideTip);
  }

  // Show the view for an SAE and a latent, which come from the address.
  async show(sae, latent) {
    if (sae.features) await sae.load();
    const isOther = sae !== this.sae;
    Object.assign(this, { sae, latent });
    if (isOther && this.text.value.trim()) await this.ask();
    else this.draw();
    return this.element;
  }

  // Run the text as it is in the field now.
  async start() {
    if (!this.text.value.trim()) {
      this.say("Type a text first.");
      this.text.focus();
      return;
    }
    if (this.text.value !== this.asked) Object.assign(this, { masked: null, position: -1 });
    await this.ask();
  }

  async mask(position) {
    this.masked = position;
    this.text.value = this.asked;
    await this.ask();
  }

  async ask() {
    const ticket = (this.ticket = {});
    this.asked = this.text.value;
    writeStored(PROMPT_KEY, this.asked, "sessionStorage");
    this.button.disabled = true;
    this.say("Running …");
    try {
      const answer = await callServer(this.run, "encode", this.request());
      if (ticket !== this.ticket) return;
      this.result = new PromptResult(answer);
      this.position = this.choosePosition();
      this.describeResult();
    } catch (error) {
      if (ticket !== this.ticket) return;
      this.result = null;
      this.say(error.message);
    } finally {
      if (ticket === this.ticket) this.button.disabled = false;
    }
    this.change.reset();
    this.draw();
  }

  request() {
    return { text: wellFormed(this.asked), sae: this.sae.name, masked: this.masked };
  }

  // The selected token; in a new text the last one, or the first mask.
  choosePosition() {
    const { tokens, kept, masks } = this.result;
    if (this.position >= 0 && this.position < tokens.length) return this.position;
    return masks[0] ?? (kept.includes(true) ? kept.lastIndexOf(true) : tokens.length - 1);
  }

  say(text) {
    this.status.replaceChildren(document.createTextNode(visible(text)));
  }

  describeResult() {
    const { tokens, kept, counts, is_cut } = this.result;
    const used = counts.filter((_, position) => kept[position]);
    const mean = used.reduce((sum, count) => sum + count, 0) / used.length;
    const firing = used.length ? `, on each of which ${formatShort(mean)} latents fire on average` : "";
    const cut = is_cut ? ` The text is longer: it is cut after ${formatCount(tokens.length)} tokens.` : "";
    this.say(`${formatCount(tokens.length)} tokens; the SAE uses ${formatCount(used.length)}${firing}.${cut}`);
  }

  describeToken(position) {
    const { tokens, kept, counts } = this.result;
    const lines = [showToken(tokens[position], 60), `position ${position}: ${formatCount(counts[position])} latents fire`];
    const value = this.latent >= 0 ? this.shades[position] : 0;
    if (value) lines.push(`latent ${this.latent}: ${formatNumber(value)}`);
    if (!kept[position]) lines.push("not used by the SAE");
    return lines;
  }

  select(position) {
    this.position = position;
    this.draw();
  }

  draw() {
    const shown = this.result !== null;
    this.tokens.hidden = this.columns.hidden = !shown;
    if (!shown) return;
    this.drawTokens();
    this.drawFiring();
    this.drawPredictions();
    this.change.draw();
  }

  drawTokens() {
    const { tokens, kept, is_mask } = this.result;
    this.shades = this.latent >= 0 ? this.result.activations(this.latent) : tokens.map(() => 0);
    const largest = Math.max(this.sae.max?.[this.latent] ?? 0, ...this.shades.map(Math.abs));
    this.tokens.setAttribute("aria-label", this.latent >= 0 ? `Tokens, shaded by the activation of latent ${this.latent}` : "Tokens");
    this.tokens.replaceChildren(...tokens.flatMap((text, position) => {
      const value = this.shades[position], space = /^ */.exec(text)[0];
      const isSelected = position === this.position;
      const token = h("span", {
        class: ["ptok", value && "on", !kept[position] && "excluded", is_mask[position] && "mask"].filter(Boolean).join(" "),
        role: "option", "data-position": position, tabindex: isSelected ? "0" : "-1", "aria-selected": String(isSelected),
        "aria-label": value ? `${showToken(text)}, activation ${formatNumber(value)}` : null,
      }, text.slice(space.length) || (space ? "·".repeat(space.length) : "∅"));
      if (value) setStyle(token, { "--on": `${Math.round(12 + 58 * Math.sqrt(Math.abs(value) / largest))}%` });
      const gap = position > 0 && space && text !== space ? " " : "";
      return [gap, token, text.includes("\n") ? h("br") : ""].filter(Boolean);
    }));
  }

  drawFiring() {
    const pairs = this.result.latentsOn(this.position), count = this.result.counts[this.position];
    const largest = Math.max(...pairs.map(({ value }) => Math.abs(value)));
    const rows = pairs.map(({ latent, value }) => setStyle(h("li", { class: "with-bar" },
      h("a", { href: permalink({ view: "prompt", latent }), "aria-current": latent === this.latent ? "true" : null },
        h("span", { class: "number" }, String(latent)), this.words(latent, 6)),
      h("span", { class: "value" }, formatNumber(value))), { "--share": Math.abs(value) / largest }));
    const first = innerWidth < NARROW ? SHOWN_ON_NARROW : SHOWN_LATENTS;
    const more = h("button", { type: "button", onclick: () => { more.remove(); list.append(...rows.slice(first)); } }, `Show all ${rows.length}`);
    const list = h("ol", { class: "table-list" }, rows.slice(0, first));
    const isKept = this.result.kept[this.position];
    replaceContent(this.firing, [
      h("h2", {}, `Latents on ${this.result.label(this.position)}`, h("small", {}, count ? "activation" : "")),
      !isKept && h("p", { class: "note" }, "The SAE was not trained on such tokens: special tokens, the first position of some models, or activations with a very large norm. What fires here means little."),
      !count && h("p", { class: "empty" }, "No latent fires on this token."),
      list, rows.length > first && more,
      count > rows.length && h("p", { class: "note" }, `The ${formatCount(rows.length)} strongest of ${formatCount(count)} latents.`)]);
  }

  // The most frequent tokens of a latent, if features were collected.
  words(latent, count) {
    const tokens = this.sae.features ? this.sae.topTokens(latent).slice(0, count) : [];
    return h("span", { class: "words" }, tokens.map(({ token }) => h("span", { class: "word" }, tokenParts(this.sae.text.vocabulary[token], 16))));
  }

  drawPredictions() {
    this.predicted.hidden = this.kind === "none";
    const found = this.result.predictions[this.position], label = this.result.label(this.position);
    const isMask = this.result.is_mask[this.position];
    const unmask = this.masked === this.position && h("button", { type: "button", onclick: () => this.mask(null) }, "Unmask");
    const mask = this.kind === "masked" && !isMask && h("button", { type: "button", onclick: () => this.mask(this.position) }, "Mask this token");
    const title = this.kind === "causal" ? `Predicted after ${label}` : isMask ? `Predicted for ${label}` : `Prediction for ${label}`;
    replaceContent(this.predicted, [
      h("h2", {}, title, h("small", {}, found ? "probability" : "")),
      mask && h("p", { class: "note" }, "The model predicts masked tokens only."), mask, unmask,
      found && h("ol", { class: "table-list" }, found.map(([text, share]) => setStyle(
        h("li", { class: "with-bar" }, h("span", { class: "word" }, tokenParts(text, 32)), h("span", { class: "value" }, formatShare(share))), { "--share": share / found[0][1] })))]);
  }
}

const promptViews = [];

// The view of prompts; there is one per page, so that a text stays when the SAE changes.
function showPrompt(run, sae, latent) {
  promptViews[0] ??= new PromptView(run);
  return promptViews[0].show(sae, latent);
}
