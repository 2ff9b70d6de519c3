// Draws every chart of the page. `data-drawn` on the root says that all are there: "yes", or what went wrong.
const specs = JSON.parse(document.getElementById("charts").textContent);
const places = [...document.querySelectorAll("[data-chart]")];
const options = { actions: false, renderer: "svg", tooltip: { theme: "custom", offsetX: 14, offsetY: 14 } };
try {
  await Promise.all(places.map((place) => window.vegaEmbed(place, specs[Number(place.dataset.chart)], options)));
  document.documentElement.dataset.drawn = "yes";
} catch (error) {
  document.documentElement.dataset.drawn = String(error);
  throw error;
}
