// Which latents are listed, and in which order.
const SORTS = {
  variance_explained: ["variance explained", (sae) => sae.variance_explained, formatShare],
  rate: ["firing rate", (sae) => sae.count, (value, sae) => formatShare(value / sae.features.tokens)],
  max: ["largest activation", (sae) => sae.max, (value) => formatNumber(value)],
  mean: ["mean activation", (sae) => sae.mean_active, (value) => formatNumber(value)],
  purity: ["purity", (sae) => sae.purity, formatShare],
  entropy: ["entropy of tokens", (sae) => sae.entropy, (value) => `${formatFixed(value, 2)} bits`],
  loss_effect: ["loss effect", (sae) => sae.loss_effect, (value) => (isNumber(value) ? formatNumber(value, 2) : "–")],
  encoder_decoder_cosine: ["encoder-decoder cosine", (sae) => sae.encoder_decoder_cosine, (value) => formatFixed(value, 2)],
  index: ["number", () => null, (value) => String(value)],
};
const DENSE_RATE = 0.1;
const FILTERS = {
  all: ["all latents", () => true],
  alive: ["that fire", (sae, i) => sae.count[i] > 0],
  dead: ["dead (never fire)", (sae, i) => sae.count[i] === 0],
  dense: ["dense", (sae, i) => sae.rate(i) > DENSE_RATE],
  sparse: ["sparse", (sae, i) => sae.count[i] > 0 && sae.rate(i) <= DENSE_RATE],
  noted: ["with a note", (sae, i) => notes.read(sae.name, i) !== ""],
};

function availableSorts(sae) {
  return Object.keys(SORTS).filter((name) => name !== "loss_effect" || sae.loss_effect);
}

// The latents with a token among their most frequent tokens, and the number of firings on it.
function firingsOnToken(sae, number) {
  const found = new Map();
  for (let latent = 0; latent < sae.latents; latent++) {
    for (let i = sae.tokenStarts[latent]; i < sae.tokenStarts[latent + 1]; i++) {
      if (sae.token_ids[i] === number) found.set(latent, sae.token_counts[i]);
    }
  }
  return found;
}

async function matchQuery(sae, query) {
  const phrase = query.trim().toLowerCase();
  if (!phrase) return null;
  const matches = new Uint8Array(sae.latents);
  const tokens = new Uint8Array(sae.text.vocabulary.length);
  sae.text.vocabulary.forEach((text, i) => { tokens[i] = text.toLowerCase().includes(phrase) ? 1 : 0; });
  for (let latent = 0; latent < sae.latents; latent++) {
    for (let i = sae.tokenStarts[latent]; i < sae.tokenStarts[latent + 1]; i++) if (tokens[sae.token_ids[i]]) matches[latent] = 1;
  }
  await sae.loadDetails();
  const hits = sae.text.findPhrase(phrase);
  const rows = hits.length - 1;
  for (let latent = 0; latent < sae.latents; latent++) {
    if (matches[latent]) continue;
    for (let i = sae.contextStarts[latent]; i < sae.contextStarts[latent + 1] && !matches[latent]; i++) {
      const row = sae.context_token[i];
      if (hits[Math.min(rows, row + AFTER + 1)] === hits[Math.max(0, row - BEFORE)]) continue;
      const [start, stop] = sae.text.windowOf(row);
      if (hits[stop] > hits[start]) matches[latent] = 1;
    }
  }
  if (/^\d+$/.test(phrase) && Number(phrase) < sae.latents) matches[Number(phrase)] = 1;
  return matches;
}

// The numbers of the latents to list. ``token`` is a number of the vocabulary, or -1.
async function selectLatents(sae, { query, sort, descending, filter, token }) {
  const matches = await matchQuery(sae, query);
  const firings = token >= 0 ? firingsOnToken(sae, token) : null;
  const keep = FILTERS[filter][1];
  const exact = query.trim() ? Number(query.trim()) : NaN;
  const found = [];
  for (let i = 0; i < sae.latents; i++) {
    if ((!matches || matches[i]) && (!firings || firings.has(i)) && (keep(sae, i) || i === exact)) found.push(i);
  }
  const keys = SORTS[sort][1](sae);
  const sign = descending ? -1 : 1;
  const key = (i) => (firings ? firings.get(i) : keys ? keys[i] : i);
  const missing = (value) => Number.isNaN(value);
  const order = firings ? -1 : sign;
  found.sort((a, b) => missing(key(a)) - missing(key(b)) || order * (key(a) - key(b)) || a - b);
  if (found.includes(exact)) found.unshift(...found.splice(found.indexOf(exact), 1));
  return { found, firings };
}
