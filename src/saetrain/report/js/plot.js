// Charts as SVG: they follow the theme by CSS, print well, and their text is text.
const MARGIN = { top: 8, right: 10, bottom: 36, left: 52 };

function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const factors = [0.5, 1, 2, 5, 10];
  const place = factors.findIndex((factor) => factor * power >= raw);
  const wide = multiplesOf(power * factors[place], low, high);
  // A range of less than two steps would have a single tick.
  return wide.length > 2 || place === 0 ? wide : multiplesOf(power * factors[place - 1], low, high);
}

function multiplesOf(step, low, high) {
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 3] : [1]) ticks.push(factor * 10 ** power);
  }
  const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return inside.length >= 2 ? inside : [low, high];
}

function formatTick(value, log) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (log && size < 1e-2 && Math.abs(Math.log10(size) - Math.round(Math.log10(size))) < 1e-6) {
    return formatPower(Math.round(Math.log10(size)));
  }
  if (size >= 1e6) return `${trimZeros((value / 1e6).toPrecision(3))} M`;
  if (size >= 1e4) return `${trimZeros((value / 1e3).toPrecision(3))} k`;
  if (size < 1e-3) {
    const exponent = Math.floor(Math.log10(size) + 1e-9);
    return `${minus(trimZeros((value / 10 ** exponent).toFixed(1)))}·${formatPower(exponent)}`;
  }
  if (size >= 1000) return formatCount(value);
  return minus(trimZeros(value.toPrecision(3)));
}

function trimZeros(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function makeScale(low, high, from, to, log) {
  const f = log ? Math.log : (value) => value;
  const span = f(high) - f(low) || 1;
  const scale = (value) => from + ((f(value) - f(low)) / span) * (to - from);
  scale.invert = (pixel) => {
    const value = f(low) + ((pixel - from) / (to - from || 1)) * span;
    return log ? Math.exp(value) : value;
  };
  return scale;
}

function drawAxes(root, width, height, x, y, axes) {
  const bottom = height - MARGIN.bottom, right = width - MARGIN.right;
  const xTicks = axes.xTicks ?? (axes.xLog ? logTicks : linearTicks)(axes.xLow, axes.xHigh, Math.max(2, width / 90));
  const yTicks = (axes.yLog ? logTicks : linearTicks)(axes.yLow, axes.yHigh, 4);
  for (const tick of yTicks) {
    root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }));
    root.append(svg("text", { class: "tick", x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, formatTick(tick, axes.yLog)));
  }
  root.append(svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
  for (const tick of xTicks) {
    const label = axes.xFormat ? axes.xFormat(tick) : formatTick(tick, axes.xLog);
    const anchor = x(tick) > right - 14 ? "end" : "middle";
    root.append(svg("text", { class: "tick", x: Math.min(x(tick), right), y: bottom + 15, "text-anchor": anchor }, label));
  }
  root.append(svg("text", { class: "axis-label", x: right, y: height - 4, "text-anchor": "end" }, axes.xLabel));
}

// A figure whose drawing follows its width. ``draw(width)`` returns the SVG element.
function makeFigure({ title, note, yLabel, controls, draw, className = "" }) {
  const place = h("div", { class: "plot" });
  const figure = h(
    "figure",
    { class: `chart ${className}` },
    h("figcaption", {}, h("span", { class: "chart-title" }, title), yLabel && h("span", { class: "unit" }, yLabel), controls),
    place,
    note && h("p", { class: "note" }, note),
  );
  let last = 0;
  figure.redraw = () => {
    const width = Math.round(place.clientWidth);
    if (!width) return;
    last = width;
    place.replaceChildren(draw(width));
  };
  new ResizeObserver(() => Math.round(place.clientWidth) !== last && figure.redraw()).observe(place);
  return figure;
}

function makeSwitch(label, options, current, onChange) {
  const group = h("span", { class: "switch", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    const button = h("button", { type: "button", "aria-pressed": String(value === current) }, text);
    button.addEventListener("click", () => {
      for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
      onChange(value);
    });
    group.append(button);
  }
  return group;
}

// Curves: ``series`` is a list of {name, x, y, className, dots}.
function lineFigure({ title, xLabel, yLabel, series, logX = false, logY = false, format = formatNumber, height = 220 }) {
  const axesOf = { x: logX, y: logY };
  const draw = (width) => {
    const points = series.map(({ x, y }) =>
      x.map((value, i) => [value, y[i]]).filter(
        ([a, b]) => isNumber(a) && isNumber(b) && (!axesOf.x || a > 0) && (!axesOf.y || b > 0),
      ),
    );
    const all = points.flat();
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
    root.setAttribute("aria-label", visible(describeCurves(title, series, points, format)));
    if (!all.length) {
      root.append(svg("text", { class: "tick", x: width / 2, y: height / 2, "text-anchor": "middle" }, "no values"));
      return root;
    }
    const xs = all.map((point) => point[0]), ys = all.map((point) => point[1]);
    const axes = { xLabel, xLog: axesOf.x, yLog: axesOf.y, xLow: Math.min(...xs), xHigh: Math.max(...xs) };
    [axes.yLow, axes.yHigh] = padRange(Math.min(...ys), Math.max(...ys), axesOf.y);
    const x = makeScale(axes.xLow, axes.xHigh, MARGIN.left, width - MARGIN.right, axesOf.x);
    const y = makeScale(axes.yLow, axes.yHigh, height - MARGIN.bottom, MARGIN.top, axesOf.y);
    drawAxes(root, width, height, x, y, axes);
    series.forEach(({ className = "", dots }, i) => {
      if (dots) {
        for (const [a, b] of points[i]) root.append(svg("circle", { class: `dot ${className}`, cx: x(a), cy: y(b), r: 3.5 }));
      } else {
        const path = points[i].map(([a, b], j) => `${j ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
        root.append(svg("path", { class: `line ${className}`, d: path }));
      }
    });
    addCrosshair(root, width, height, x, points, series, format, xLabel);
    return root;
  };
  const figure = makeFigure({
    title,
    yLabel,
    draw,
    controls: h(
      "span",
      { class: "controls" },
      makeSwitch(`Vertical axis of ${title}`, [[false, "linear"], [true, "log"]], logY, (value) => {
        axesOf.y = value;
        figure.redraw();
      }),
    ),
  });
  figure.setLogX = (value) => {
    axesOf.x = value;
    figure.redraw();
  };
  return figure;
}

function padRange(low, high, log) {
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, low * 1.2), Math.max(0, high * 1.2)];
  const pad = (high - low) * 0.06;
  return [low >= 0 && low < (high - low) * 0.6 ? 0 : low - pad, high + pad];
}

function describeCurves(title, series, points, format) {
  const parts = series.map(({ name }, i) => {
    const found = points[i];
    return found.length ? `${name}: from ${format(found[0][1])} to ${format(found[found.length - 1][1])}` : `${name}: no values`;
  });
  return `${title}. ${parts.slice(0, 8).join("; ")}`;
}

function addCrosshair(root, width, height, x, points, series, format, xLabel) {
  const line = svg("line", { class: "crosshair", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
  const area = svg("rect", { class: "catch", x: MARGIN.left, y: 0, width: Math.max(0, width - MARGIN.left - MARGIN.right), height: height - MARGIN.bottom });
  root.append(line, area);
  area.addEventListener("pointermove", (event) => {
    const value = x.invert(event.clientX - root.getBoundingClientRect().left);
    const lines = [];
    let nearest = null;
    series.forEach(({ name }, i) => {
      if (!points[i].length) return;
      const point = points[i].reduce((best, other) => (Math.abs(other[0] - value) < Math.abs(best[0] - value) ? other : best));
      nearest ??= point[0];
      lines.push(`${shorten(name, 36)}  ${format(point[1])}`);
    });
    if (nearest === null) return;
    for (const end of ["x1", "x2"]) line.setAttribute(end, x(nearest));
    line.setAttribute("visibility", "visible");
    showTip(event, [`${formatCount(nearest)} ${xLabel}`, ...lines.slice(0, 12)]);
  });
  area.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    hideTip();
  });
}

// Bars over equal bins: ``bars`` is a list of {low, high, value, label}; ``outline`` has one value per bar.
function barFigure({ title, xLabel, yLabel, note, bars, outline, zero, logY = false, xTicks, xFormat, format = formatCount, height = 200, controls = true, className }) {
  const state = { log: logY };
  const draw = (width) => {
    const gap = zero ? 34 : 0;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
    const values = [...bars.map((bar) => bar.value), ...(outline ?? []), ...(zero ? [zero.value] : [])];
    const positive = values.filter((value) => value > 0);
    const yHigh = Math.max(...positive, 1e-12) * (state.log ? 1.3 : 1.05);
    const yLow = state.log ? Math.min(...positive, yHigh) / 2 : 0;
    const axes = { xLabel, xTicks, xFormat, yLog: state.log, yLow, yHigh, xLow: bars[0].low, xHigh: bars[bars.length - 1].high };
    const x = makeScale(axes.xLow, axes.xHigh, MARGIN.left + gap, width - MARGIN.right, false);
    const y = makeScale(yLow, yHigh, height - MARGIN.bottom, MARGIN.top, state.log);
    const top = (value) => (value > 0 ? y(value) : height - MARGIN.bottom);
    drawAxes(root, width, height, x, y, axes);
    root.setAttribute("aria-label", visible(describeBars(title, bars, zero, format)));
    const addBar = (from, to, value, label, kind) => {
      const bar = svg("rect", { class: `bar ${kind}`, x: from, y: top(value), width: Math.max(1, to - from - 1), height: Math.max(0, height - MARGIN.bottom - top(value)) });
      const catcher = svg("rect", { class: "catch", x: from, y: MARGIN.top, width: Math.max(1, to - from), height: height - MARGIN.bottom - MARGIN.top });
      catcher.addEventListener("pointermove", (event) => showTip(event, [label, format(value)]));
      catcher.addEventListener("pointerleave", hideTip);
      root.append(bar, catcher);
    };
    if (zero) {
      addBar(MARGIN.left + 4, MARGIN.left + 24, zero.value, zero.label, "zero");
      root.append(svg("text", { class: "tick", x: MARGIN.left + 14, y: height - MARGIN.bottom + 15, "text-anchor": "middle" }, "0"));
    }
    for (const { low, high, value, label } of bars) addBar(x(low), x(high), value, label, "");
    if (outline) {
      const path = bars.map(({ low, high }, i) => `${i ? "L" : "M"}${x(low).toFixed(1)},${top(outline[i]).toFixed(1)}L${x(high).toFixed(1)},${top(outline[i]).toFixed(1)}`).join("");
      root.append(svg("path", { class: "line baseline", d: path }));
    }
    return root;
  };
  const figure = makeFigure({
    title, yLabel, note, draw, className,
    controls: controls && h("span", { class: "controls" }, makeSwitch(`Vertical axis of ${title}`, [[false, "linear"], [true, "log"]], logY, (value) => {
      state.log = value;
      figure.redraw();
    })),
  });
  return figure;
}

function describeBars(title, bars, zero, format) {
  const highest = bars.reduce((best, bar) => (bar.value > best.value ? bar : best));
  return `${title}. Highest bar: ${highest.label}, ${format(highest.value)}${zero ? `. ${zero.label}: ${format(zero.value)}` : ""}`;
}

// Tooltip ---------------------------------------------------------------------------------------------------------------
function showTip(event, lines) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(...lines.map((line) => h("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const below = event.clientY + 18 + height < innerHeight;
  setStyle(tip, { left: `${Math.max(8, left)}px`, top: `${below ? event.clientY + 18 : event.clientY - height - 12}px` });
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

// The square that holds all points.
function boundPoints(points) {
  const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  points.forEach((value, i) => {
    low[i % 2] = Math.min(low[i % 2], value);
    high[i % 2] = Math.max(high[i % 2], value);
  });
  return { x: (low[0] + high[0]) / 2, y: (low[1] + high[1]) / 2, side: Math.max(1, high[0] - low[0], high[1] - low[1]) };
}

// Map of points, on a canvas because an SVG of tens of thousands of points is slow -------------------------------------------
function mapFigure({ title, note, points, colors, label, describe, onPick }) {
  let height = 0;
  const box = boundPoints(points);
  const canvas = h("canvas", { class: "map", tabindex: "0", role: "img", "aria-label": label });
  const place = (i, width) => {
    const unit = (width - 28) / box.side;
    return [width / 2 + (points[2 * i] - box.x) * unit, height / 2 - (points[2 * i + 1] - box.y) * unit];
  };
  const nearest = (event) => {
    const view = canvas.getBoundingClientRect();
    let best = -1, least = 144;
    for (let i = 0; i < points.length / 2; i++) {
      const [x, y] = place(i, view.width);
      const distance = (x - event.clientX + view.left) ** 2 + (y - event.clientY + view.top) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  };
  const draw = (width) => {
    const ratio = devicePixelRatio || 1;
    height = width;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    setStyle(canvas, { width: `${width}px`, height: `${height}px` });
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const shades = { dead: style.getPropertyValue("--faint"), alive: style.getPropertyValue("--accent") };
    context.scale(ratio, ratio);
    const size = points.length > 20000 ? 1.6 : points.length > 4000 ? 2.2 : 3;
    for (let i = 0; i < points.length / 2; i++) {
      const [x, y] = place(i, width);
      const shade = colors ? colors(i) : 0.6;
      context.globalAlpha = shade < 0 ? 0.5 : 0.2 + 0.7 * shade;
      context.fillStyle = shade < 0 ? shades.dead : shades.alive;
      context.fillRect(x - size / 2, y - size / 2, size, size);
    }
    return canvas;
  };
  canvas.addEventListener("pointermove", (event) => {
    const found = nearest(event);
    canvas.classList.toggle("over", found >= 0);
    if (found >= 0) showTip(event, describe(found));
    else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const found = nearest(event);
    hideTip();
    if (found >= 0) onPick(found);
  });
  return makeFigure({ title, note, draw, className: "map-chart" });
}
