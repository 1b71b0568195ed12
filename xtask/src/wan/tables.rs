//! Finished measurements as tables in Markdown and as rows for `--json`.
//!
//! There is one table for each model, link and budget, and where Beringia ran on several engines one for each: the peers
//! stand in all. A figure is the median over seeds and repeats, with the smallest and the largest where there are several.

use crate::wan::figures::{Figures, Spread};
use crate::wan::link::LinkKind;
use crate::wan::results::{Budget, Cell, Outcome, PEER};
use crate::wan::series::loss_at;
use serde::Serialize;
use std::fmt::Write;

/// The system that losses are compared with.
const REFERENCE: &str = "ddp";

const HEADER: &str = "| system | runs | tokens/s | utilisation | MB a site sent in 1,000 steps | MB a site sent at the start \
                      | first step, s | longest stall, s | validation loss | against DDP |";

/// What the measurements of one table have in common.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Group {
    /// Beringia's engine; the peers' rows are beside it.
    pub(crate) engine: String,
    /// Name of the model.
    pub(crate) size: String,
    /// Between the sites.
    pub(crate) link: LinkKind,
    /// How long each trains.
    pub(crate) budget: Budget,
}

impl Group {
    fn holds(&self, cell: &Cell) -> bool {
        let key = &cell.key;
        let engine = key.engine == self.engine || key.engine == PEER;
        engine && key.size == self.size && key.link == self.link && key.budget == self.budget
    }

    /// Its measurements, as they were made.
    pub(crate) fn cells<'a>(&self, cells: &'a [Cell]) -> Vec<&'a Cell> {
        cells.iter().filter(|cell| self.holds(cell)).collect()
    }

    /// Above its table and its picture.
    pub(crate) fn title(&self) -> String {
        let Self { engine, size, link, budget } = self;
        let engine = if engine == PEER { String::new() } else { format!(", Beringia on {engine}") };
        let rate = link.mbit.map_or_else(|| "no limit".to_owned(), |mbit| format!("{mbit} Mbit/s"));
        let delay = if link.round_trip_ms > 0 { format!(", {} ms", link.round_trip_ms) } else { String::new() };
        format!("{size} parameters, {rate}{delay}, {budget}{engine}")
    }

    /// For the name of a file.
    pub(crate) fn slug(&self) -> String {
        let engine = if self.engine == PEER { "peers" } else { &self.engine };
        let budget = match self.budget {
            Budget::Steps(steps) => format!("{steps}"),
            Budget::Minutes(minutes) => format!("{minutes}min"),
        };
        let text = format!("wan-{}-{}-{budget}-{engine}", self.size, self.link);
        text.replace([':', '+', '.'], "-")
    }
}

/// All groups, in the order of their first measurement by engine. One in which Beringia was not measured is the peers' own.
pub(crate) fn groups(cells: &[Cell]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for cell in cells {
        let key = &cell.key;
        let (engine, size) = (key.engine.clone(), key.size.clone());
        let group = Group { engine, size, link: key.link, budget: key.budget };
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    let own: Vec<Group> = groups.iter().filter(|group| group.engine != PEER).cloned().collect();
    let same = |a: &Group, b: &Group| (&a.size, a.link, a.budget) == (&b.size, b.link, b.budget);
    groups.retain(|group| group.engine != PEER || !own.iter().any(|other| same(group, other)));
    groups
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    /// Name of the system.
    pub(crate) system: String,
    /// What computed.
    pub(crate) engine: String,
    /// Measurements that ended well.
    pub(crate) runs: usize,
    /// Why the others did not.
    pub(crate) failures: Vec<String>,
    /// Tokens of trainings that were cut short: their speed and bytes count, their loss does not.
    cut_tokens: Option<Spread>,
    tokens_per_second: Option<Spread>,
    utilisation: Option<Spread>,
    sent_mb_per_1000_steps: Option<Spread>,
    start_mb: Option<Spread>,
    first_step_seconds: Option<Spread>,
    stall_seconds: Option<Spread>,
    validation_nats: Option<Spread>,
    /// Loss over that of DDP with the same seed, less 1.
    against_reference: Option<Spread>,
    /// At [`equal_seconds`].
    training_nats_after_equal_time: Option<Spread>,
}

/// The time at which training losses are compared: the end of the training that was over first.
pub(crate) fn equal_seconds(cells: &[&Cell]) -> f64 {
    cells.iter().filter_map(|cell| cell.figures()).map(|figures| figures.seconds).fold(f64::INFINITY, f64::min)
}

/// The rows of one table; `all` holds the measurements of DDP on other links, too.
pub(crate) fn rows(group: &Group, all: &[Cell]) -> Vec<Row> {
    let cells = group.cells(all);
    let seconds = equal_seconds(&cells);
    let mut names: Vec<(&str, &str)> = Vec::new();
    for cell in &cells {
        let name = (cell.key.system.as_str(), cell.key.engine.as_str());
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let of_name = |(system, engine): (&str, &str)| {
        let own: Vec<&Cell> =
            cells.iter().copied().filter(|cell| cell.key.system == system && cell.key.engine == engine).collect();
        row(&own, all, seconds)
    };
    names.into_iter().filter_map(of_name).collect()
}

fn row(cells: &[&Cell], all: &[Cell], equal_seconds: f64) -> Option<Row> {
    let key = &cells.first()?.key;
    let figures: Vec<&Figures> = cells.iter().filter_map(|cell| cell.figures()).collect();
    let spread = |of: &dyn Fn(&Figures) -> f64| Spread::of(figures.iter().map(|figures| of(figures)));
    let failure = |cell: &&Cell| match &cell.outcome {
        Outcome::Failed(reason) => Some(reason.clone()),
        Outcome::Done(_) => None,
    };
    Some(Row {
        system: key.system.clone(),
        engine: key.engine.clone(),
        runs: figures.len(),
        failures: cells.iter().filter_map(failure).collect(),
        cut_tokens: spread(&|figures| if figures.validation_nats.is_none() { figures.tokens } else { f64::NAN }),
        tokens_per_second: spread(&|figures| figures.tokens_per_second),
        utilisation: spread(&Figures::utilisation),
        sent_mb_per_1000_steps: spread(&|figures| most(&figures.sent_bytes_per_1000_steps) / 1e6),
        start_mb: spread(&|figures| most(&figures.start_bytes) / 1e6),
        first_step_seconds: spread(&|figures| figures.first_step_seconds),
        stall_seconds: spread(&|figures| figures.stall_seconds),
        validation_nats: spread(&|figures| figures.validation_nats.unwrap_or(f64::NAN)),
        against_reference: Spread::of(cells.iter().filter_map(|cell| against_reference(cell, all))),
        training_nats_after_equal_time: spread(&|figures| loss_at(&figures.curve, equal_seconds).unwrap_or(f64::NAN)),
    })
}

/// Of the site that sent most.
fn most(bytes: &[f64]) -> f64 {
    bytes.iter().copied().fold(0.0, f64::max)
}

/// A validation loss over DDP's of the same model, seed and budget, less 1. DDP computes the same on every link: where steps are
/// counted and it was not run on this one, another one's will do.
fn against_reference(cell: &Cell, all: &[Cell]) -> Option<f64> {
    let key = &cell.key;
    let is_reference = |other: &&Cell| {
        let same = (&other.key.size, other.key.seed, other.key.budget) == (&key.size, key.seed, key.budget);
        let link = other.key.link == key.link || matches!(key.budget, Budget::Steps(_));
        let is_whole = other.figures().is_some_and(|figures| figures.validation_nats.is_some());
        other.key.system == REFERENCE && same && link && is_whole
    };
    let references = || all.iter().filter(is_reference);
    let reference = references().find(|other| other.key.link == key.link).or_else(|| references().next())?;
    Some(cell.figures()?.validation_nats? / reference.figures()?.validation_nats? - 1.0)
}

/// One table in Markdown.
pub(crate) fn markdown(group: &Group, all: &[Cell]) -> String {
    let cells = group.cells(all);
    let seconds = equal_seconds(&cells);
    let mut text = format!("### {}\n", group.title());
    if let Some(cell) = cells.first() {
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(text, "Link by iperf3: {}.", cell.link_measured);
    }
    let when = if seconds.is_finite() { format!("{:.1}", seconds / 60.0) } else { "equal".to_owned() };
    let _ = writeln!(text, "\n{HEADER} training loss after {when} minutes |\n|---|{}", "---:|".repeat(10));
    for row in rows(group, all) {
        let _ = writeln!(text, "{}", line(&row));
    }
    for row in rows(group, all) {
        for failure in row.failures {
            let _ = writeln!(text, "\n{} failed: {failure}", row.system);
        }
    }
    text
}

fn line(row: &Row) -> String {
    let text = |spread: &Option<Spread>, digits: usize, unit: f64, sign: &str| {
        let number = |value: f64| match sign {
            "%" => format!("{:.digits$} %", unit * value),
            "+%" => format!("{:+.digits$} %", unit * value),
            _ => format!("{:.digits$}", unit * value),
        };
        match spread {
            None => String::new(),
            Some(spread) if row.runs < 2 => number(spread.median),
            Some(Spread { median, least, most }) => {
                format!("{} ({} to {})", number(*median), number(*least), number(*most))
            }
        }
    };
    let mut loss = text(&row.validation_nats, 4, 1.0, "");
    if row.cut_tokens.is_some() {
        let _ = write!(loss, " cut short at {} tokens", text(&row.cut_tokens, 0, 1.0, ""));
    }
    let cells = [
        text(&row.tokens_per_second, 0, 1.0, ""),
        text(&row.utilisation, 1, 100.0, "%"),
        text(&row.sent_mb_per_1000_steps, 1, 1.0, ""),
        text(&row.start_mb, 1, 1.0, ""),
        text(&row.first_step_seconds, 1, 1.0, ""),
        text(&row.stall_seconds, 2, 1.0, ""),
        loss.trim().to_owned(),
        text(&row.against_reference, 2, 100.0, "+%"),
        text(&row.training_nats_after_equal_time, 3, 1.0, ""),
    ];
    format!("| {} | {} | {} |", row.system, row.runs, cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::results::examples::cell;

    #[test]
    fn a_table_has_medians_and_spreads_over_seeds() {
        let cells = [
            cell("ddp", PEER, 1, 200.0, 2.0),
            cell("diloco", "flex", 1, 3_000.0, 2.02),
            cell("diloco", "flex", 2, 3_800.0, 2.1),
            cell("diloco", "flex", 3, 3_900.0, 2.0),
        ];
        let groups = groups(&cells);
        assert_eq!(groups.len(), 1);
        let text = markdown(&groups[0], &cells);
        let expected = "| diloco | 3 | 3800 (3000 to 3900) | 95.0 % (75.0 % to 97.5 %) | 50.0 (50.0 to 50.0) | \
                        3.0 (3.0 to 3.0) | 2.5 (2.5 to 2.5) | 0.75 (0.75 to 0.75) | 2.0200 (2.0000 to 2.1000) | \
                        +1.00 % (+1.00 % to +1.00 %) | 2.000 (2.000 to 2.000) |";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("| ddp | 1 | 200 | 5.0 % | 50.0 |"), "{text}");
        assert!(text.starts_with("### 5M parameters, 20 Mbit/s, 50 ms, 300 steps a site, Beringia on flex\n"));
        let columns = |line: &str| line.matches('|').count();
        let table: Vec<usize> = text.lines().filter(|line| line.starts_with('|')).map(columns).collect();
        assert_eq!(table, [12; 4], "{text}");
    }

    #[test]
    fn each_engine_has_its_table_beside_the_peers() {
        let cells =
            [cell("ddp", PEER, 1, 1.0, 2.0), cell("a", "flex", 1, 1.0, 2.0), cell("a", "torch:cpu", 1, 1.0, 2.0)];
        let groups = groups(&cells);
        assert_eq!(groups.iter().map(|group| group.engine.as_str()).collect::<Vec<_>>(), ["flex", "torch:cpu"]);
        assert!(groups.iter().all(|group| rows(group, &cells).len() == 2));
        assert_eq!(groups[1].slug(), "wan-5M-20-50ms-300-torch-cpu");
        assert_eq!(super::groups(&cells[..1])[0].title(), "5M parameters, 20 Mbit/s, 50 ms, 300 steps a site");
    }

    #[test]
    fn ddp_of_another_link_serves_where_steps_are_equal() {
        let mut ddp = cell("ddp", PEER, 1, 1.0, 2.0);
        let mut other = cell("diloco", "flex", 1, 1.0, 2.1);
        ddp.key.link = "none".parse().unwrap();
        assert!((against_reference(&other, &[ddp.clone()]).unwrap() - 0.05).abs() < 1e-12);
        for cell in [&mut ddp, &mut other] {
            cell.key.budget = Budget::Minutes(2.0);
        }
        assert_eq!(against_reference(&other, &[ddp]), None);
    }

    #[test]
    fn a_training_that_was_cut_short_has_speed_but_no_loss() {
        let mut cut = cell("ddp", PEER, 1, 200.0, 2.0);
        if let Outcome::Done(figures) = &mut cut.outcome {
            figures.validation_nats = None;
        }
        let cells = [cut, cell("diloco", "flex", 1, 3_000.0, 2.02)];
        let text = markdown(&groups(&cells)[0], &cells);
        assert!(
            text.contains("| ddp | 1 | 200 | 5.0 % |") && text.contains("| cut short at 600 tokens |  |"),
            "{text}"
        );
        assert_eq!(against_reference(&cells[1], &cells), None);
    }

    #[test]
    fn what_failed_is_told() {
        let mut failed = cell("hivemind-sync", PEER, 1, 1.0, 2.0);
        failed.outcome = Outcome::Failed("no wheel".to_owned());
        let cells = [failed];
        let text = markdown(&groups(&cells)[0], &cells);
        assert!(text.contains("| hivemind-sync | 0 |") && text.contains("hivemind-sync failed: no wheel"), "{text}");
    }
}
