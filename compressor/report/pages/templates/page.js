// Draw every chart of the page. Then set `data-drawn` on the root element to "yes", or to the error message.
const specs = JSON.parse(document.getElementById("charts").textContent);
const charts = [...document.querySelectorAll("[data-chart]")];
const options = { actions: false, renderer: "svg", tooltip: { theme: "custom", offsetX: 14, offsetY: 14 } };
try {
  await Promise.all(charts.map((chart) => window.vegaEmbed(chart, specs[Number(chart.dataset.chart)], options)));
  document.documentElement.dataset.drawn = "yes";
} catch (error) {
  document.documentElement.dataset.drawn = String(error);
  throw error;
}
