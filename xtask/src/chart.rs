//! Line charts as SVG, written by hand: panels one above the other that share their horizontal axis.
//!
//! Enough for a bench to show its curves in a document; not a plotting library.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
const MARGIN_LEFT: f64 = 72.0;
const MARGIN_RIGHT: f64 = 24.0;
/// Above each panel: its title.
const MARGIN_TOP: f64 = 40.0;
/// Below each panel: numbers of the horizontal axis.
const MARGIN_BOTTOM: f64 = 34.0;
/// Below everything: what the horizontal axis means.
const FOOT: f64 = 22.0;
/// About as many numbers stand along an axis.
const TICKS: f64 = 6.0;

/// One line of a panel.
pub(crate) struct Series {
    /// For the legend; series of the same name share an entry.
    pub(crate) name: String,
    /// CSS colour.
    pub(crate) color: &'static str,
    /// Drawn in dashes, without marks: for bounds.
    pub(crate) dashed: bool,
    /// Ascending in x.
    pub(crate) points: Vec<(f64, f64)>,
}

/// Axes with lines.
pub(crate) struct Panel {
    /// Above it: what the vertical axis means.
    pub(crate) title: String,
    /// Height of the axes, pixels.
    pub(crate) height: f64,
    /// What is drawn.
    pub(crate) series: Vec<Series>,
}

/// A whole chart.
pub(crate) struct Chart {
    /// At the top.
    pub(crate) title: String,
    /// Below the last panel.
    pub(crate) x_title: String,
    /// From top to bottom.
    pub(crate) panels: Vec<Panel>,
}

/// A linear axis whose ends are round numbers.
struct Axis {
    start: f64,
    end: f64,
    step: f64,
    /// Pixels of `start` and `end`.
    pixels: (f64, f64),
}

impl Axis {
    /// Holds all `values`; one that has no extent, or is no number, gets an extent of 1.
    fn over(values: impl Iterator<Item = f64>, pixels: (f64, f64)) -> Self {
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if low < high { (low, high) } else { (if low.is_finite() { low } else { 0.0 }, low + 1.0) };
        let high = if high.is_finite() { high } else { low + 1.0 };
        let step = round_step((high - low) / TICKS);
        Self { start: (low / step).floor() * step, end: (high / step).ceil() * step, step, pixels }
    }

    fn at(&self, value: f64) -> f64 {
        let (first, last) = self.pixels;
        first + (last - first) * (value - self.start) / (self.end - self.start)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let count = ((self.end - self.start) / self.step).round() as u32;
        (0..=count).map(|index| self.start + f64::from(index) * self.step)
    }

    /// With as many digits as tell one tick from the next.
    fn text(&self, value: f64) -> String {
        let digits = (-self.step.log10().floor()).clamp(0.0, 9.0) as usize;
        format!("{value:.digits$}")
    }
}

/// The least of 1, 2 and 5 times a power of ten that is not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    // A hair of tolerance: log10 of 1000 may be a little under 3.
    factors.into_iter().map(|factor| factor * power).find(|round| *round >= step * (1.0 - 1e-9)).unwrap_or(step)
}

impl Chart {
    /// The chart as an SVG document.
    pub(crate) fn svg(&self) -> String {
        let panel_height = |panel: &Panel| MARGIN_TOP + panel.height + MARGIN_BOTTOM;
        let height = MARGIN_TOP + self.panels.iter().map(panel_height).sum::<f64>() + FOOT;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let middle = (MARGIN_LEFT + WIDTH - MARGIN_RIGHT) / 2.0;
        text(&mut svg, (middle, 26.0), "middle", "font-size=\"15\" font-weight=\"bold\"", &self.title);
        let x = Axis::over(self.points().map(|point| point.0), (MARGIN_LEFT, WIDTH - MARGIN_RIGHT));
        let mut top = MARGIN_TOP;
        for panel in &self.panels {
            panel.draw(&mut svg, &x, top + MARGIN_TOP);
            top += panel_height(panel);
        }
        text(&mut svg, (middle, top + 8.0), "middle", "", &self.x_title);
        svg.push_str("</svg>\n");
        svg
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.panels.iter().flat_map(|panel| &panel.series).flat_map(|series| series.points.iter().copied())
    }
}

impl Panel {
    fn draw(&self, svg: &mut String, x: &Axis, top: f64) {
        let bottom = top + self.height;
        let values = self.series.iter().flat_map(|series| &series.points).map(|point| point.1);
        let y = Axis::over(values, (bottom, top));
        text(svg, (MARGIN_LEFT, top - 12.0), "start", "", &self.title);
        for value in y.ticks() {
            let at = y.at(value);
            line(svg, (x.pixels.0, at), (x.pixels.1, at));
            text(svg, (MARGIN_LEFT - 8.0, at + 4.0), "end", "", &y.text(value));
        }
        for value in x.ticks() {
            let at = x.at(value);
            line(svg, (at, top), (at, bottom));
            text(svg, (at, bottom + 18.0), "middle", "", &x.text(value));
        }
        for series in &self.series {
            series.draw(svg, x, &y);
        }
        self.legend(svg, top);
    }

    fn legend(&self, svg: &mut String, top: f64) {
        let mut names: Vec<&str> = Vec::new();
        for series in &self.series {
            if names.contains(&series.name.as_str()) {
                continue;
            }
            let at = top + 20.0 + 20.0 * names.len() as f64;
            let (left, right) = (WIDTH - MARGIN_RIGHT - 210.0, WIDTH - MARGIN_RIGHT - 180.0);
            series.stroke(svg, &format!("{left},{} {right},{}", at - 4.0, at - 4.0));
            text(svg, (right + 8.0, at), "start", "", &series.name);
            names.push(&series.name);
        }
    }
}

impl Series {
    fn draw(&self, svg: &mut String, x: &Axis, y: &Axis) {
        let places: Vec<(f64, f64)> = self.points.iter().map(|point| (x.at(point.0), y.at(point.1))).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.stroke(svg, &path.join(" "));
        for (x, y) in places.iter().filter(|_| !self.dashed) {
            // Writing to a string cannot fail, here and below.
            let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{}\"/>", self.color);
        }
    }

    fn stroke(&self, svg: &mut String, points: &str) {
        let dashes = if self.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let color = self.color;
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\"{dashes}/>"
        );
    }
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64)) {
    let ((x1, y1), (x2, y2)) = (from, to);
    let _ = writeln!(svg, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"#dddddd\"/>");
}

fn text(svg: &mut String, place: (f64, f64), anchor: &str, style: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let (x, y) = place;
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{words}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_and_hold_all_values() {
        let axis = Axis::over([2.13, 4.9].into_iter(), (100.0, 0.0));
        assert!((axis.start - 2.0).abs() < 1e-9 && (axis.end - 5.0).abs() < 1e-9, "{} {}", axis.start, axis.end);
        assert!((axis.at(2.0) - 100.0).abs() < 1e-9 && axis.at(5.0).abs() < 1e-9);
        assert_eq!(
            axis.ticks().map(|tick| axis.text(tick)).collect::<Vec<_>>().first().map(String::as_str),
            Some("2.0")
        );
        for step in [0.003, 0.7, 1.0, 4.2, 1_000.0] {
            let round = round_step(step);
            assert!(round >= step * 0.999 && round <= step * 2.51, "{step}: {round}");
        }
    }

    #[test]
    fn a_chart_of_nothing_and_of_one_point_is_still_a_document() {
        for points in [vec![], vec![(1.0, 1.0)], vec![(0.0, f64::NAN)]] {
            let series = Series { name: "a<b".to_owned(), color: "red", dashed: false, points };
            let panel = Panel { title: "y".to_owned(), height: 100.0, series: vec![series] };
            let chart = Chart { title: "t".to_owned(), x_title: "x".to_owned(), panels: vec![panel] };
            let svg = chart.svg();
            assert!(svg.contains("a&lt;b") && !svg.contains("inf"), "{svg}");
        }
    }
}
