//! A plan as an SVG: the timeline of one round, and where each site's time and energy go.
//!
//! Lengths are to scale: inner steps with their parts inside the site (products, exposed communication, pipeline bubble), the transfers of
//! fragments on the links below them, and what stalls. Text is escaped; nothing of it is taken from anywhere but the plan.

use crate::search::Plan;
use crate::search::between::Strategy;
use core::fmt::Write;

const WIDTH: f64 = 900.0;
/// Left of the bars: names.
const LEFT: f64 = 150.0;
/// Right of the bars: figures.
const RIGHT: f64 = 170.0;
const BAR: f64 = 18.0;
const ROW: f64 = 28.0;
const HEADING: f64 = 34.0;

/// Fragments that are drawn one by one; more would be a grey bar anyway.
const FRAGMENTS_DRAWN_MAX: u32 = 64;

/// Characters of a name that have room.
const NAME_MAX: usize = 20;

/// What a bar's part stands for, and its colour.
const PARTS: [(&str, &str); 4] = [
    ("computation", "#2b6cb0"),
    ("communication inside", "#d69e2e"),
    ("pipeline bubble", "#a0aec0"),
    ("waiting for other sites", "#c53030"),
];

const TRANSFER: &str = "#38a169";

/// The plan as an SVG document.
pub fn svg(plan: &Plan) -> String {
    let mut body = String::new();
    let mut top = 16.0;
    title(&mut body, &mut top, &heading(plan));
    timeline(plan, &mut body, &mut top);
    bars(plan, &mut body, &mut top, "Where time goes", &|_| Some(1.0), "");
    let energy = |index: usize| plan.sites[index].account.energy.map(|energy| energy.kilowatt_hours());
    bars(plan, &mut body, &mut top, "Where energy goes (kWh of the run)", &energy, " kWh");
    legend(&mut body, &mut top);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{top:.0}\" viewBox=\"0 0 {WIDTH} {top:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn heading(plan: &Plan) -> String {
    let way = if plan.sites.len() == 1 { "one site".to_owned() } else { plan.way.describe() };
    format!("One round of {:.0} s: {way}; {:.1} % inner steps", plan.round.total().0, 100.0 * plan.round.utilisation)
}

fn timeline(plan: &Plan, body: &mut String, top: &mut f64) {
    let total = plan.round.total().0;
    let scale = (WIDTH - LEFT - RIGHT) / total;
    for (index, site) in plan.sites.iter().enumerate() {
        name(body, *top, &site.name);
        let steps = plan.round.compute.0 * scale;
        parts(plan, index, body, *top, (LEFT, steps + plan.round.stall.0 * scale));
        figure(body, *top, &format!("{:.1} % of tokens", 100.0 * site.share));
        *top += ROW;
    }
    if plan.sites.len() > 1 {
        name(body, *top, "links");
        transfers(plan, body, *top, scale);
        figure(body, *top, &format!("{:.1} s on the links", plan.round.transfer.0));
        *top += ROW;
    }
    ruler(body, top, total, scale);
}

/// One mark for each fragment, at the step after which it is taken.
fn transfers(plan: &Plan, body: &mut String, top: f64, scale: f64) {
    let drawn = plan.way.fragments.clamp(1, FRAGMENTS_DRAWN_MAX);
    let each = plan.round.transfer.0 / f64::from(plan.way.fragments.max(1));
    let total = plan.round.total().0;
    for fragment in 0..drawn {
        // A fragment leaves every H / P steps; the whole model at the round's end, before what stalls.
        let begin = match plan.way.strategy {
            Strategy::Streaming => total * f64::from(fragment) / f64::from(drawn),
            _ => plan.round.compute.0,
        };
        let length = each.min(total - begin).max(0.0);
        rectangle(body, (LEFT + begin * scale, top), (length * scale).max(1.0), TRANSFER, "0.75");
    }
}

/// A bar of a site's four parts.
fn parts(plan: &Plan, index: usize, body: &mut String, top: f64, (left, width): (f64, f64)) {
    let prediction = &plan.sites[index].prediction;
    let used = plan.round.utilisation;
    let shares = [
        prediction.compute_share * used,
        prediction.communication_share * used,
        prediction.bubble_share * used,
        1.0 - used,
    ];
    let mut at = left;
    for (share, (_, colour)) in shares.iter().zip(PARTS) {
        rectangle(body, (at, top), share * width, colour, "1");
        at += share * width;
    }
}

fn bars(plan: &Plan, body: &mut String, top: &mut f64, heading: &str, size: &dyn Fn(usize) -> Option<f64>, unit: &str) {
    let sizes: Vec<Option<f64>> = (0..plan.sites.len()).map(size).collect();
    let largest = sizes.iter().flatten().copied().fold(0.0, f64::max);
    if largest <= 0.0 {
        return;
    }
    *top += 8.0;
    title(body, top, heading);
    for (index, (site, size)) in plan.sites.iter().zip(&sizes).enumerate() {
        name(body, *top, &site.name);
        match size {
            Some(size) => {
                parts(plan, index, body, *top, (LEFT, size / largest * (WIDTH - LEFT - RIGHT)));
                let text = if unit.is_empty() {
                    format!("MFU {:.1} %", 100.0 * site.prediction.mfu)
                } else {
                    format!("{size:.0}{unit}")
                };
                figure(body, *top, &text);
            }
            None => figure(body, *top, "unknown"),
        }
        *top += ROW;
    }
}

fn legend(body: &mut String, top: &mut f64) {
    *top += 10.0;
    let mut left = LEFT;
    for (label, colour) in PARTS.into_iter().chain([("transfer of a fragment", TRANSFER)]) {
        rectangle(body, (left, *top), 12.0, colour, "1");
        text(body, (left + 16.0, *top + 13.0), "start", label);
        left += 34.0 + 6.3 * label.len() as f64;
    }
    *top += ROW + 8.0;
}

fn ruler(body: &mut String, top: &mut f64, total: f64, scale: f64) {
    for quarter in 0..=4 {
        let seconds = total * f64::from(quarter) / 4.0;
        text(body, (LEFT + seconds * scale, *top + 8.0), "middle", &format!("{seconds:.1} s"));
    }
    *top += 20.0;
}

fn title(body: &mut String, top: &mut f64, words: &str) {
    let escaped = escaped(words);
    let _ = writeln!(
        body,
        "<text x=\"16\" y=\"{:.1}\" font-size=\"14\" font-weight=\"bold\">{escaped}</text>",
        *top + 12.0
    );
    *top += HEADING;
}

fn name(body: &mut String, top: f64, words: &str) {
    let short: String = words.chars().take(NAME_MAX).collect();
    text(body, (LEFT - 8.0, top + 13.0), "end", &short);
}

fn figure(body: &mut String, top: f64, words: &str) {
    text(body, (WIDTH - RIGHT + 8.0, top + 13.0), "start", words);
}

fn text(body: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let _ = writeln!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escaped(words));
}

fn rectangle(body: &mut String, (x, y): (f64, f64), width: f64, colour: &str, opacity: &str) {
    let _ = writeln!(
        body,
        "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{BAR}\" fill=\"{colour}\" fill-opacity=\"{opacity}\"/>"
    );
}

fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::Catalogue;
    use crate::cluster::Cluster;
    use crate::models;
    use crate::search::{Task, Wish, plans};

    const CLUSTER: &str = "
        [link_default]
        gbit_s = 1
        round_trip_ms = 20
        [[site]]
        name = \"a <b> & c\"
        device = \"A100\"
        devices = 64
        [[site]]
        name = \"d\"
        device = \"H100\"
        devices = 64
    ";

    #[test]
    fn a_picture_is_well_formed_and_its_bars_fill_the_round() {
        let (catalogue, cluster) = (Catalogue::built_in(), Cluster::parse(CLUSTER).unwrap());
        let task = Task { shape: models::parse("llama-3-8b").unwrap(), global_batch: 1_024, tokens: 1e11 };
        let (sites, links) = (cluster.specs(&catalogue).unwrap(), cluster.network().unwrap());
        let svg = svg(&plans(&task, &sites, &links, &Wish::default()).unwrap()[0]);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("a &lt;b&gt; &amp; c"));
        let widths = |colour: &str| {
            let lines = svg.lines().filter(|line| line.starts_with("<rect x") && line.contains(colour));
            lines
                .map(|line| line.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse::<f64>().unwrap())
                .sum::<f64>()
        };
        // Timeline and time bars of two sites, and the larger energy bar with a part of itself: 5 to 6 full widths, and the legend.
        let all: f64 = PARTS.iter().map(|(_, colour)| widths(colour)).sum();
        let full = WIDTH - LEFT - RIGHT;
        assert!((5.0 * full..=6.2 * full).contains(&all), "{all}");
        assert!(widths(TRANSFER) > 12.0 && !svg.contains("NaN"));
    }
}
