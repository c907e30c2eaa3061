"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const isNarrow = () => window.innerWidth < 620;

  // Figures name colours as CSS variables; put in the values of the present theme.
  const paint = (node, style, key) => {
    if (Array.isArray(node)) return node.map((child) => paint(child, style, key));
    if (node && typeof node === "object") {
      return Object.fromEntries(Object.entries(node).map(([name, child]) => [name, paint(child, style, name)]));
    }
    const isColour = key === "color" && typeof node === "string" && node.startsWith("--");
    return isColour ? style.getPropertyValue(node).trim() : node;
  };

  const axis = (own) => ({
    gridcolor: { color: "--line" }, zeroline: false, automargin: true, linecolor: { color: "--line" },
    ...own, title: { standoff: 10, font: { size: 13, color: "--muted" }, ...(own && own.title) },
  });

  const layoutOf = (own, style) => {
    const layout = {
      ...own,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "--ink" },
      margin: { l: 8, r: 12, t: 8, b: 8, ...own.margin },
      showlegend: false,
      xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
      hoverlabel: { font: { size: 13 } }, hovermode: "closest", dragmode: isNarrow() ? false : "zoom",
    };
    const painted = paint(layout, style);
    for (const side of [painted.xaxis, painted.yaxis]) {
      side.gridcolor = side.gridcolor.color;
      side.linecolor = side.linecolor.color;
    }
    return painted;
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [id, spec] of Object.entries(figures)) {
      const target = document.getElementById("plot-" + id);
      const config = { responsive: true, displaylogo: false, displayModeBar: false };
      Plotly.react(target, paint(spec.data, style), layoutOf(spec.layout, style), config);
    }
  };

  const load = async () => {
    const packed = atob(document.getElementById("plotly").textContent.trim());
    const bytes = Uint8Array.from(packed, (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  };

  if (Object.keys(figures).length) {
    load().catch((error) => {
      console.error("charts can not be drawn", error);
      for (const target of document.querySelectorAll(".plot")) {
        target.style.height = "auto";
        target.textContent = "This browser can not draw the chart; every browser of 2023 or later can.";
      }
    });
  }
})();
