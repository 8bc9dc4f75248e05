// The columns of the page: decoded when a view needs them, and kept.
const TYPES = {
  u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, i2: Int16Array, i4: Int32Array,
  f4: Float32Array, f8: Float64Array,
};
const NO_TOKEN = -1;
const BEFORE = 16, AFTER = 8; // Positions of a context before and after the token on which the latent fires.
const SEQUENCE_START = 1, DOCUMENT_START = 2, EXCLUDED = 4;
const decoded = new Map();
let manifest = {};

async function inflate(name) {
  const element = document.getElementById(name);
  const text = element.textContent;
  element.remove();
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(text)
    : Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readJson(name) {
  return JSON.parse(new TextDecoder().decode(await inflate(name)));
}

async function decodeColumn(name) {
  const { type, length, step } = manifest[name];
  if (type === "json") return readJson(name);
  const planes = await inflate(name);
  const width = TYPES[type].BYTES_PER_ELEMENT;
  let bytes = planes;
  if (width > 1) {
    bytes = new Uint8Array(planes.length);
    for (let plane = 0; plane < width; plane++) {
      const start = plane * length;
      for (let i = 0, to = plane; i < length; i++, to += width) bytes[to] = planes[start + i];
    }
  }
  const values = new TYPES[type](bytes.buffer, 0, length);
  return step ? Float32Array.from(values, (value) => value * step) : values;
}

function readColumn(name) {
  if (!decoded.has(name)) decoded.set(name, name in manifest ? decodeColumn(name) : Promise.resolve(null));
  return decoded.get(name);
}

async function readColumns(prefix, names) {
  const found = await Promise.all(names.map((name) => readColumn(`${prefix}.${name}`)));
  return Object.fromEntries(names.map((name, i) => [name, found[i]]));
}

function sumLengths(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) starts[i + 1] = starts[i] + lengths[i];
  return starts;
}

// The text that was read, with the tokens of the page --------------------------------------------------------------------
class Text {
  constructor(vocabulary, { token, flags, doc }) {
    Object.assign(this, { vocabulary, token, flags, doc });
    this.pieces = vocabulary.some((text) => text.startsWith("##"));
    this.spaced = vocabulary.some((text) => /^[ ▁Ġ]/.test(text));
  }

  // The text of a token within a sentence; ``previous`` is whether a token precedes it.
  join(number, previous) {
    const text = this.vocabulary[number];
    if (this.pieces && text.length > 2 && text.startsWith("##")) return text.slice(2);
    if (this.spaced) return text.replace(/^▁/, " ");
    return previous ? ` ${text}` : text;
  }

  sequenceStart(row) {
    while (row > 0 && !(this.flags[row] & SEQUENCE_START)) row--;
    return row;
  }

  sequencePosition(row) {
    return row - this.sequenceStart(row);
  }

  document(row) {
    if (!this.documentStarts) {
      this.documentStarts = [];
      this.flags.forEach((flags, i) => flags & DOCUMENT_START && this.documentStarts.push(i));
    }
    return this.doc[upperBound(this.documentStarts, row) - 1];
  }

  windowOf(row) {
    let start = row, stop = row + 1;
    while (start > 0 && row - start < BEFORE && !(this.flags[start] & SEQUENCE_START)) start--;
    while (stop < this.token.length && stop - row <= AFTER && !(this.flags[stop] & SEQUENCE_START)) stop++;
    return [start, stop];
  }

  // Rows of the stream inside occurrences of a phrase, as counts up to each row.
  findPhrase(phrase) {
    if (!this.lowered) {
      const ends = new Uint32Array(this.token.length);
      const parts = [];
      let length = 0;
      for (let row = 0; row < this.token.length; row++) {
        const isStart = (this.flags[row] & SEQUENCE_START) !== 0;
        const part = (isStart ? "\n" : "") + this.join(this.token[row], !isStart).toLowerCase();
        parts.push(part);
        ends[row] = length += part.length;
      }
      this.lowered = parts.join("");
      this.ends = ends;
    }
    const hits = new Uint32Array(this.token.length + 1);
    for (let at = this.lowered.indexOf(phrase); at !== -1; at = this.lowered.indexOf(phrase, at + phrase.length)) {
      hits[upperBound(this.ends, at) + 1] += 1;
    }
    for (let row = 1; row < hits.length; row++) hits[row] += hits[row - 1];
    return hits;
  }
}

function upperBound(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// One SAE of the page ------------------------------------------------------------------------------------------------------
const LIST_COLUMNS = [
  "count", "max", "mean_active", "purity", "entropy", "variance_explained", "encoder_decoder_cosine", "loss_effect",
  "token_ids", "token_ids.length", "token_counts",
];
const LATENT_COLUMNS = [
  "quantiles", "histogram", "positions", "neighbours", "neighbours.length", "neighbour_cosines", "cofiring",
  "cofiring.length", "cofiring_lift", "lens_top", "lens_top.length", "lens_top_logits", "lens_bottom",
  "lens_bottom.length", "lens_bottom_logits", "loss_effect_low", "loss_effect_high",
];
const CONTEXT_COLUMNS = [
  "contexts", "context_token", "context_band", "context_value", "context_others", "other_offset", "other_value",
];
const BAND_NAMES = [
  "Strongest", "Top quarter", "Second quarter", "Third quarter", "Bottom quarter", "Near the threshold",
];

class Sae {
  constructor(entry) {
    Object.assign(this, entry);
  }

  load() {
    this.loading ??= this.readList();
    return this.loading;
  }

  async readList() {
    Object.assign(this, await readColumns(this.prefix, LIST_COLUMNS));
    const stream = `t${this.features.stream}`;
    const [vocabulary, columns] = await Promise.all([
      readColumn("vocabulary"),
      readColumns(stream, ["token", "flags", "doc"]),
    ]);
    this.text = Sae.texts.get(stream) ?? new Text(vocabulary, columns);
    Sae.texts.set(stream, this.text);
    this.tokenStarts = sumLengths(this["token_ids.length"]);
    return this;
  }

  loadDetails() {
    this.loadingDetails ??= this.readDetails();
    return this.loadingDetails;
  }

  async readDetails() {
    await this.load();
    Object.assign(this, await readColumns(this.prefix, [...LATENT_COLUMNS, ...CONTEXT_COLUMNS]));
    this.contextStarts = sumLengths(this.contexts);
    this.otherStarts = sumLengths(this.context_others);
    this.starts = {};
    for (const name of ["neighbours", "cofiring", "lens_top", "lens_bottom"]) {
      this.starts[name] = sumLengths(this[`${name}.length`]);
    }
    return this;
  }

  rate(latent) {
    return this.count[latent] / this.features.tokens;
  }

  topTokens(latent) {
    const tokens = [];
    for (let i = this.tokenStarts[latent]; i < this.tokenStarts[latent + 1]; i++) {
      tokens.push({ token: this.token_ids[i], count: this.token_counts[i] });
    }
    return tokens;
  }

  pairs(latent, name, values) {
    const found = [];
    for (let i = this.starts[name][latent]; i < this.starts[name][latent + 1]; i++) {
      found.push({ item: this[name][i], value: this[values][i] });
    }
    return found;
  }

  row(name, latent, width) {
    return Array.from(this[name].subarray(latent * width, (latent + 1) * width));
  }

  contextsOf(latent) {
    const found = [];
    for (let i = this.contextStarts[latent]; i < this.contextStarts[latent + 1]; i++) {
      const row = this.context_token[i];
      const [start, stop] = this.text.windowOf(row);
      const activations = new Float32Array(stop - start);
      const value = this.context_value[i] * this.max[latent];
      activations[row - start] = value;
      for (let j = this.otherStarts[i]; j < this.otherStarts[i + 1]; j++) {
        activations[row - start + this.other_offset[j]] = this.other_value[j] * this.max[latent];
      }
      found.push({ band: this.context_band[i], row, start, value, activations });
    }
    return found;
  }

  describe(latent) {
    const word = (number) => this.text.vocabulary[number];
    const words = (name, values) =>
      this.pairs(latent, name, values).map(({ item, value }) => ({ token: word(item), logit: value }));
    return {
      sae: this.name,
      latent,
      fires_on_tokens: this.count[latent],
      of_tokens: this.features.tokens,
      max: this.max[latent],
      mean_active: this.mean_active[latent],
      variance_explained: this.variance_explained[latent],
      loss_effect: this.loss_effect ? this.loss_effect[latent] : null,
      purity: this.purity[latent],
      entropy_bits: this.entropy[latent],
      encoder_decoder_cosine: this.encoder_decoder_cosine[latent],
      tokens: this.topTokens(latent).map(({ token, count }) => ({ token: word(token), count })),
      lens_top: words("lens_top", "lens_top_logits"),
      lens_bottom: words("lens_bottom", "lens_bottom_logits"),
      neighbours: this.pairs(latent, "neighbours", "neighbour_cosines").map(({ item, value }) => ({ latent: item, cosine: value })),
      cofiring: this.pairs(latent, "cofiring", "cofiring_lift").map(({ item, value }) => ({ latent: item, lift: value })),
      contexts: this.contextsOf(latent).map(({ band, row, start, value, activations }) => ({
        band: BAND_NAMES[band],
        value,
        document: this.text.document(row),
        position: this.text.sequencePosition(row),
        tokens: Array.from(activations, (_, i) => word(this.text.token[start + i])),
        activations: Array.from(activations),
      })),
      note: notes.read(this.name, latent) || undefined,
    };
  }
}
Sae.texts = new Map();
