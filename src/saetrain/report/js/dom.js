// Elements, text and numbers. Strings of the run reach the page only through text nodes and fixed attributes.

// Control, bidirectional, zero-width and other invisible characters, which are shown as glyphs.
const INVISIBLE = new RegExp(
  "[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200f" +
    "\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff0-\\ufffb]|[\\u{e0000}-\\u{e0fff}]" +
    "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]",
  "gu",
);
const MAX_MARKS = 2; // Combining marks per character; more of them would paint over other lines.
const MANY_MARKS = new RegExp(`(\\p{M}{${MAX_MARKS}})\\p{M}+`, "gu");
const GLYPHS = { "\n": "↵", "\t": "⇥" };

function showInvisible(character) {
  if (GLYPHS[character]) return GLYPHS[character];
  // Few fonts have the pictures of control characters, U+2400 to U+2421.
  const code = character.codePointAt(0);
  return `⟨${code.toString(16).toUpperCase().padStart(code < 0x100 ? 2 : 4, "0")}⟩`;
}

function visible(text) {
  return String(text).replace(INVISIBLE, showInvisible).replace(MANY_MARKS, "$1…");
}

function shorten(text, length) {
  const shown = visible(text);
  return shown.length > length ? `${shown.slice(0, length - 1).trimEnd()}…` : shown;
}

// A token on its own: a leading or trailing space is visible.
function showToken(text, length = 24) {
  if (text === "") return "∅";
  return shorten(text.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length)), length);
}

// The same as text nodes, with faint marks for spaces.
function tokenParts(text, length) {
  const [, before, inner, after] = /^(·*)(.*?)(·*)$/s.exec(showToken(text, length));
  const mark = (dots) => dots && h("span", { class: "faint" }, dots);
  return [mark(before), inner, mark(after)];
}

const TEXT_ATTRIBUTES = new Set(["title", "aria-label", "placeholder"]);
const SVG = "http://www.w3.org/2000/svg";

function fillElement(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : TEXT_ATTRIBUTES.has(name) ? visible(value) : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return element;
}

function h(name, attributes = {}, ...children) {
  return fillElement(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fillElement(document.createElementNS(SVG, name), attributes, children);
}

function setStyle(element, values) {
  for (const [name, value] of Object.entries(values)) element.style.setProperty(name, value);
  return element;
}

// Numbers -------------------------------------------------------------------------------------------------------------
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const countFormat = new Intl.NumberFormat("en");
const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

function formatCount(value) {
  return isNumber(value) ? countFormat.format(Math.round(value)) : "–";
}

function formatPower(exponent) {
  return `10${exponent < 0 ? "⁻" : ""}${[...String(Math.abs(exponent))].map((digit) => SUPERSCRIPTS[digit]).join("")}`;
}

function formatNumber(value, digits = 3) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e5) return countFormat.format(Math.round(value));
  if (size < 1e-3) {
    const exponent = Math.floor(Math.log10(size));
    return `${minus((value / 10 ** exponent).toFixed(1))} × ${formatPower(exponent)}`;
  }
  return minus(value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size)))));
}

function formatShort(value) {
  return isNumber(value) ? minus(trimZeros(formatNumber(value).replace("−", "-"))) : "–";
}

function formatFixed(value, places) {
  return isNumber(value) ? minus(value.toFixed(places)) : "–";
}

function formatShare(value) {
  if (!isNumber(value)) return "–";
  const percent = value * 100;
  if (percent === 0) return "0 %";
  if (Math.abs(percent) < 0.001) return `${formatNumber(percent, 2)} %`;
  return `${minus(percent.toFixed(Math.abs(percent) >= 10 ? 1 : Math.abs(percent) >= 0.1 ? 2 : 3))} %`;
}

function formatDuration(seconds) {
  if (!isNumber(seconds) || seconds <= 0) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function minus(text) {
  return text.replace("-", "−");
}

function lastPart(path) {
  return String(path).replace(/\/+$/, "").split("/").pop();
}

// Files, clipboard, messages --------------------------------------------------------------------------------------------
function announce(text) {
  const place = document.getElementById("status");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => place.classList.remove("shown"), 2500);
}

async function copyText(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Some browsers give pages from disk no clipboard.
    const area = h("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce(`${what} copied`);
}

function saveFile(name, text) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function readStored(key, fallback, storage = "localStorage") {
  try {
    return JSON.parse(window[storage].getItem(key)) ?? fallback;
  } catch {
    return fallback;
  }
}

function writeStored(key, value, storage = "localStorage") {
  try {
    window[storage].setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
