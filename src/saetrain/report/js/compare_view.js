// The SAEs of a run next to one another: held-out FVU, dead latents and time, each against another quantity.
const MARKS = [
  (r) => `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`,
  (r) => `M${-r},${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0,${-1.3 * r}L${1.2 * r},${r}H${-1.2 * r}Z`,
  (r) => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0Z`,
  (r) => `M0,${1.3 * r}L${1.2 * r},${-r}H${-1.2 * r}Z`,
  (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
];

// A figure of points; ``groups`` is a list of {name, points}, and a point is {name, x, y, low, high}.
function pointFigure({ title, xLabel, yLabel, groups, format, logX = false, current, onPick }) {
  const height = 260;
  const draw = (width) => {
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
    const all = groups.flatMap((group) => group.points);
    const xs = all.map((point) => point.x), ys = all.flatMap(({ y, low, high }) => [y, low, high].filter(isNumber));
    const axes = { xLabel, xLog: logX, yLog: false };
    [axes.xLow, axes.xHigh] = padRange(Math.min(...xs), Math.max(...xs), logX);
    [axes.yLow, axes.yHigh] = padRange(Math.min(...ys), Math.max(...ys), false);
    const x = makeScale(axes.xLow, axes.xHigh, MARGIN.left, width - MARGIN.right, logX);
    const y = makeScale(axes.yLow, axes.yHigh, height - MARGIN.bottom, MARGIN.top, false);
    drawAxes(root, width, height, x, y, axes);
    root.setAttribute("aria-label", visible(`${title}. ${all.slice(0, 8).map((point) => `${point.name}: ${format(point.y)}`).join("; ")}`));
    groups.forEach((group, i) => {
      for (const point of group.points) {
        const mark = svg("g", { class: `point series${i % MARKS.length} ${point.name === current ? "current" : ""}`, transform: `translate(${x(point.x).toFixed(1)},${y(point.y).toFixed(1)})` });
        if (isNumber(point.low) && isNumber(point.high)) {
          mark.append(svg("line", { x1: 0, x2: 0, y1: y(point.low) - y(point.y), y2: y(point.high) - y(point.y) }));
        }
        mark.append(svg("path", { d: MARKS[i % MARKS.length](point.name === current ? 6 : 4.5) }));
        const range = isNumber(point.low) && point.low < point.high ? ` (${format(point.low)} to ${format(point.high)})` : "";
        mark.addEventListener("pointermove", (event) => showTip(event, [point.name, `${yLabel}: ${format(point.y)}${range}`, `${xLabel}: ${formatShort(point.x)}`]));
        mark.addEventListener("pointerleave", hideTip);
        mark.addEventListener("click", () => {
          hideTip();
          onPick(point.name);
        });
        root.append(mark);
      }
    });
    return root;
  };
  return makeFigure({ title, yLabel, draw });
}

// The property by whose values the SAEs are told apart: the first one that has several.
function chooseGrouping(saes) {
  const properties = [["architecture", "architecture"], ["hookpoint", "hookpoint"], ["latents", "number of latents"]];
  return properties.find(([key]) => new Set(saes.map((sae) => sae[key])).size > 1) ?? properties[0];
}

function showComparison(run, sae) {
  const figures = run.evaluations[0]?.saes ?? {};
  const found = run.saes.filter(({ name }) => isNumber(figures[name]?.figures.fvu?.value) && isNumber(figures[name].figures.l0?.value));
  if (found.length < 2) return "";
  const [key, label] = chooseGrouping(found);
  const values = [...new Set(found.map((each) => each[key]))];
  const groupBy = (build) => values.map((value) => ({
    name: String(value),
    points: found.filter((each) => each[key] === value).map(build).filter((point) => isNumber(point?.y)),
  }));
  const onPick = (name) => go({ sae: name });
  const ofMetric = (metric) => ({ name }) => {
    const { value, low, high } = figures[name].figures[metric] ?? {};
    return { name, x: figures[name].figures.l0.value, y: value, low, high };
  };
  const times = ({ name, latents }) => ({ name, x: latents, y: run.step_ms?.[name] });
  const plots = [
    ["FVU and L0", "L0", "FVU on held-out text", ofMetric("fvu"), (value) => formatFixed(value, 4), false],
    ["Dead latents", "L0", "dead by rate", ofMetric("dead_below_threshold"), formatShare, false],
    ["Time of a step", "latents", "ms per micro-batch", times, (value) => formatFixed(value, 1), true],
  ].map(([title, xLabel, yLabel, build, format, logX]) => {
    const groups = groupBy(build);
    const hasPoints = groups.some((group) => group.points.length);
    return hasPoints && pointFigure({ title, xLabel, yLabel, groups, format, logX, current: sae.name, onPick });
  }).filter(Boolean);
  const legend = h("ul", { class: "legend" }, values.map((value, i) => {
    const mark = svg("svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, role: "img", "aria-label": `mark of ${shorten(String(value), 60)}` },
      svg("g", { class: `point series${i % MARKS.length}` }, svg("path", { d: MARKS[i % MARKS.length](4.5) })));
    return h("li", {}, mark, key === "latents" ? formatCount(value) : shorten(String(value), 60));
  }));
  return h("section", {},
    h("h2", {}, "Comparison"),
    h("p", { class: "note" }, `One mark per SAE, by ${label}. Lines are 95 % intervals. Click a mark to choose its SAE; ${shorten(sae.name, 60)} is larger.`),
    legend,
    h("div", { class: "charts" }, plots));
}
