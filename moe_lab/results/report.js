"use strict";
// What the plots are drawn from stands below this script; the table is usable before.
const nonce = document.currentScript.nonce;
addEventListener("DOMContentLoaded", () => plots(nonce));
table();

function table() {
  const bodies = [...document.querySelectorAll("#table tbody")];  // one for each machine
  const rows = [...document.querySelectorAll("#table tr[data-status]")];
  const texts = rows.map(row => `${row.textContent} ${row.parentNode.dataset.machine}`.toLowerCase());
  const filter = document.getElementById("filter"), status = document.getElementById("status");

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !(texts[i].includes(wanted) && (!status.value || row.dataset.status === status.value));
      shown += !row.hidden;
    });
    bodies.forEach(body => body.hidden = !body.querySelector("tr[data-status]:not([hidden])"));
    document.getElementById("shown").textContent = `${shown} of ${rows.length} cells`;
  }
  filter.addEventListener("input", show);
  status.addEventListener("change", show);
  show();

  const heads = [...document.querySelectorAll("#table thead th")];
  heads.forEach((head, column) => head.querySelector(".sort").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const keys = new Map(rows.map(row => {
      const field = row.cells[column];
      return [row, field.dataset.n === undefined ? field.textContent : Number(field.dataset.n)];
    }));
    const sorted = [...rows].sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // what is not known comes last, either way
      if (typeof x === "number" && typeof y === "number") return sign * (x - y);
      return sign * String(x).localeCompare(String(y), "en", {numeric: true});
    });
    bodies.forEach(body => body.append(...sorted.filter(row => row.parentNode === body)));
  }));
  performance.mark("table");
}

function plots(nonce) {
  const plotly = document.getElementById("plotly");
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui, sans-serif";  // as that of the plots: it measures the names in a legend
  if (!plotly) return performance.mark("plots");  // the page shows pictures
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const chosen = setting(figures.flatMap(figure => figure.panels.map(panel => panel.place)));
  const draws = figures.map((figure, i) => figureOn(figure, document.querySelector(`[data-figure="${i}"]`)));
  const redraw = () => window.Plotly && draws.forEach(draw => draw());
  const drawFrom = i => {  // one at a time, so that the page answers in between
    if (i === draws.length) return performance.mark("plots");
    draws[i]();
    setTimeout(drawFrom, 0, i + 1);
  };
  addEventListener("load", () => setTimeout(() => {
    const script = document.createElement("script");
    script.nonce = nonce;
    if (plotly.dataset.src) {
      script.onload = () => drawFrom(0);
      script.onerror = () => document.querySelectorAll(".plot").forEach(plot => {
        plot.textContent = `${plotly.dataset.src} is not beside this page, so the plots cannot be drawn.`;
      });
      script.src = plotly.dataset.src;
      document.head.append(script);
    } else {
      script.textContent = plotly.textContent;
      document.head.append(script);
      drawFrom(0);
    }
  }));
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", redraw);

  function select(choices, text, values) {
    const label = document.createElement("label"), box = document.createElement("select");
    label.append(text + " ", box);
    choices.append(label);
    options(box, values);
    return box;
  }

  function options(box, values) {
    const before = box.value;
    box.replaceChildren(...values.map(value => new Option(value, value)));
    if (values.map(String).includes(before)) box.value = before;
    box.parentNode.hidden = values.length < 2;
  }

  // A box for each key in which panels differ; all plots follow it. Returns what tells the values chosen.
  function setting(places) {
    const bar = document.getElementById("setting"), boxes = {};
    for (const key of new Set(places.flatMap(place => Object.keys(place)))) {
      const values = [...new Set(places.map(place => place[key]).filter(value => value))];
      const name = key.replace(/\.name$/, "").split(".").at(-1);
      boxes[key] = select(bar, name, values);
      for (const option of boxes[key].options) option.text = option.value.replace(`${name}=`, "");
    }
    bar.addEventListener("change", () => redraw());
    return () => Object.fromEntries(Object.entries(boxes).map(([key, box]) => [key, box.value]));
  }

  function figureOn(figure, choices) {
    const plot = document.getElementById(`plot-${figure.name}`);
    const loads = {heat: load, pairs: pairs, texts: texts}[figure.kind];
    const router = loads ? select(choices, "Variant", []) : null;
    const layer = loads ? select(choices, "Layer", []) : null;
    choices.addEventListener("change", draw);

    // The panels of the chosen setting; a chart without it shows the nearest that it has, and all say which they show.
    const misses = panel => Object.entries(chosen()).reduce(  // the model is first, and counts most
      (sum, [key, value]) => 2 * sum + (key in panel.place && panel.place[key] !== value), 0);
    function panels() {
      const nearest = figure.panels.reduce((a, b) => misses(b) < misses(a) ? b : a);
      return figure.panels.filter(panel => panel.title === nearest.title);
    }

    function draw() {
      const shown = panels(), layers = shown[0].layers;
      if (loads) {
        options(router, shown.map(panel => panel.variants));
        options(layer, layers.length > 1 && figure.kind !== "pairs" ? ["all", ...layers] : layers);
      }
      const drawn = loads ? loads(shown.find(panel => panel.variants === router.value), layer.value) : shown[0];
      const is = misses(shown[0]) === 0;
      plot.parentNode.querySelector(".panel").textContent = shown[0].title + (is ? "" : " (the chosen setting has no such plot)");
      const names = drawn.data.filter(trace => trace.showlegend !== false).map(trace => trace.name || "");
      const beside = Math.max(0, ...drawn.data.flatMap(trace => trace.orientation ? trace.y : []).map(name => name.length));
      const width = plot.clientWidth - 70 - 7 * Math.min(beside, 20);  // of the axes, and so of the legend
      const perRow = Math.max(1, Math.floor(width / (50 + Math.max(0, ...names.map(name => pen.measureText(name).width)))));
      const legend = names.length > 1 || ["lines", "front"].includes(figure.kind) || drawn.data.some(trace => trace.showlegend) ? Math.ceil(names.length / perRow) * 22 : 0;
      const height = Math.max(320, 110 + 44 * (drawn.layout.bars || 0)) + legend;
      Plotly.react(plot, drawn.data, themed(drawn.layout, height, legend), {responsive: true, displaylogo: false,
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]});
    }
    return draw;
  }

  function load(panel, layer) {
    const experts = panel.counts[0].map((_, expert) => expert);
    const relative = panel.counts.map(row => {
      const mean = row.reduce((sum, count) => sum + count, 0) / row.length;
      return row.map(count => mean ? count / mean : 0);
    });
    const axes = {xaxis: {title: {text: "expert"}}, yaxis: {title: {text: "layer"}}};
    if (layer === "all") {
      const top = Math.max(2, ...relative.map(row => Math.max(...row)));
      axes.yaxis.type = "category";
      axes.yaxis.autorange = "reversed";
      return {layout: axes, data: [{type: "heatmap", x: experts, y: panel.layers.map(String), z: relative, text: panel.counts,
        zmin: 0, zmax: top, colorscale: "Viridis", showlegend: false, colorbar: {thickness: 12, outlinewidth: 0},
        hovertemplate: "layer %{y}, expert %{x}<br>%{text} slots, %{z:.3g} x the mean<extra></extra>"}]};
    }
    const at = panel.layers.map(String).indexOf(layer);
    axes.yaxis.title.text = "slots / mean";
    return {layout: axes, data: [{type: "bar", x: experts, y: relative[at], text: panel.counts[at], textposition: "none",
      showlegend: false, marker: {color: "#3b82c4"},
      hovertemplate: "expert %{x}<br>%{text} slots, %{y:.3g} x the mean<extra></extra>"}]};
  }

  function texts(panel, layer) {
    const height = panel.texts.length + 1;  // with an empty row below each layer
    const shown = panel.layers.map((_, i) => i).filter(i => layer === "all" || String(panel.layers[i]) === layer);
    const many = shown.length * height > 45;
    const short = name => name.length > 20 ? `${name.slice(0, 19)}\u2026` : name;  // the hover has it all
    const y = [], z = [], text = [], ticks = [], names = [];
    shown.forEach((i, place) => {
      panel.counts[i].forEach((row, j) => {
        const mean = row.reduce((sum, count) => sum + count, 0) / row.length;
        const of = shown.length > 1 && (many || j === 0) ? `layer ${panel.layers[i]}` : "";
        y.push(place * height + j);
        z.push(row.map(count => mean ? count / mean : 0));
        text.push(row.map(count => `layer ${panel.layers[i]}, ${panel.texts[j]}<br>${count} slots`));
        if (many && j) return;
        ticks.push(place * height + j);
        names.push([of, many ? "" : short(panel.texts[j])].filter(part => part).join(": "));
      });
      if (place === shown.length - 1) return;
      y.push(place * height + height - 1);
      z.push(panel.counts[i][0].map(() => null));
      text.push(panel.counts[i][0].map(() => ""));
    });
    const top = Math.max(2, ...z.map(row => Math.max(...row)));
    const axes = {xaxis: {title: {text: "expert"}}, bars: many ? 18 : 0.4 * y.length,
      yaxis: {title: {text: ""}, autorange: "reversed", tickvals: ticks, ticktext: names, zeroline: false, showgrid: false}};
    return {layout: axes, data: [{type: "heatmap", y: y, z: z, text: text, zmin: 0, zmax: top, colorscale: "Viridis",
      hoverongaps: false, showlegend: false, colorbar: {thickness: 12, outlinewidth: 0},
      hovertemplate: "%{text}, %{z:.3g} x the mean<br>expert %{x}<extra></extra>"}]};
  }

  function pairs(panel, layer) {
    const counts = panel.counts[panel.layers.map(String).indexOf(layer)];
    const share = counts.map((row, i) => row.map((count, j) => i === j ? null : count / Math.max(row[i], 1)));
    const axes = {xaxis: {title: {text: "other expert"}, constrain: "domain"},
      yaxis: {title: {text: "expert"}, autorange: "reversed", scaleanchor: "x", constrain: "domain"}};
    return {layout: axes, data: [{type: "heatmap", z: share, text: counts, zmin: 0, zmax: 1, colorscale: "Viridis", hoverongaps: false,
      showlegend: false, colorbar: {thickness: 12, outlinewidth: 0},
      hovertemplate: "expert %{y}, other expert %{x}<br>%{text} tokens, %{z:.3g} of the tokens of expert %{y}<extra></extra>"}]};
  }

  function themed(layout, height, legend) {
    const style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(name).trim();
    const axis = given => ({...given, gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
      tickcolor: colour("--line"), automargin: true});
    return {...layout, height, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis), paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: {color: colour("--text"), family: "system-ui, sans-serif", size: 12},
      margin: {l: 56, r: 12, t: 32, b: 48 + legend}, showlegend: legend > 0,
      legend: {orientation: "h", traceorder: "normal", xref: "container", x: 0, yref: "container", y: 0, yanchor: "bottom"},
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line"), font: {color: colour("--text")}},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--text")}};
  }
}
