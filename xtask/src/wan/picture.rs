//! Loss over minutes of all systems of one table, as a picture.

use crate::chart::{Chart, Panel, Series};
use crate::wan::results::{Cell, PEER};
use crate::wan::tables::Group;

/// Losses above this are left out where there are lower ones, nats per byte: about what a model has that knows nothing but how
/// often each letter comes. They would flatten what is of interest.
const LOSS_SHOWN_MAX: f64 = 3.3;
/// How much longer the axis is than Beringia's longest training: the slow systems of a thin link go on for hours.
const STRETCH: f64 = 1.5;
const HEIGHT: f64 = 460.0;

/// By system, in the order of first appearance.
const COLORS: [&str; 16] = [
    "#1f5fa8", "#d2691e", "#2e8b57", "#8b3a8b", "#b8860b", "#c71585", "#008b8b", "#6b8e23", "#555555", "#e04040",
    "#4169e1", "#a0522d", "#20b2aa", "#9370db", "#ff8c00", "#000000",
];

/// The picture of one table's measurements.
pub(crate) fn chart(group: &Group, all: &[Cell]) -> Chart {
    let cells = group.cells(all);
    let longest = |is_meant: &dyn Fn(&Cell) -> bool| {
        let meant = cells.iter().filter(|cell| is_meant(cell)).filter_map(|cell| cell.figures());
        meant.map(|figures| figures.seconds).reduce(f64::max)
    };
    let own = longest(&|cell| cell.key.engine != PEER).map(|seconds| seconds * STRETCH);
    let end = own.or_else(|| longest(&|_| true)).unwrap_or(0.0);
    let mut names: Vec<&str> = Vec::new();
    let mut series = Vec::new();
    for cell in &cells {
        let Some(figures) = cell.figures() else { continue };
        let name = cell.key.system.as_str();
        if !names.contains(&name) {
            names.push(name);
        }
        let number = names.iter().position(|known| *known == name).unwrap_or_default();
        let shown = figures.curve.iter().filter(|point| point.seconds <= end);
        let points = shown.map(|point| (point.seconds / 60.0, point.nats)).collect();
        series.push(Series { name: name.to_owned(), color: COLORS[number % COLORS.len()], dashed: false, points });
    }
    let is_low = |point: &(f64, f64)| point.1 <= LOSS_SHOWN_MAX;
    if series.iter().flat_map(|series| &series.points).any(is_low) {
        series.iter_mut().for_each(|series| series.points.retain(is_low));
    }
    let title = "training loss, nats per byte, mean of the last 40 steps of both sites".to_owned();
    Chart {
        title: group.title(),
        x_title: "minutes since the sites were started".to_owned(),
        panels: vec![Panel { title, height: HEIGHT, series }],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::results::examples::cell;
    use crate::wan::tables::groups;

    #[test]
    fn systems_have_colours_and_slow_ones_are_cut_off() {
        let mut slow = cell("ddp", PEER, 1, 1.0, 2.0);
        if let crate::wan::results::Outcome::Done(figures) = &mut slow.outcome {
            figures.curve.iter_mut().for_each(|point| point.seconds *= 3.0);
        }
        let cells = [slow, cell("a", "flex", 1, 1.0, 2.0), cell("a", "flex", 2, 1.0, 2.0)];
        let chart = chart(&groups(&cells)[0], &cells);
        let series = &chart.panels[0].series;
        assert_eq!(series.iter().map(|series| series.points.len()).collect::<Vec<_>>(), [5, 10, 10]);
        assert!(series[1].color == series[2].color && series[0].color != series[1].color);
        assert!(chart.svg().contains("minutes since the sites were started"));
    }
}
