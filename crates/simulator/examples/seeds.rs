//! Simulates some seeds and prints what came of them: `cargo run -p simulator --example seeds -- FIRST COUNT [BUG [LINES]]`.

#![allow(clippy::print_stdout, reason = "an example talks to who runs it")]

use simulator::{Options, run};
use std::time::Instant;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (first, count) = (number(0), number(100));
    let sabotage = std::env::args().nth(3).and_then(|name| name.parse().ok());
    let trace_lines_max = std::env::args().nth(4).and_then(|text| text.parse().ok()).unwrap_or(60);
    let options = Options { sabotage, trace_lines_max, ..Options::default() };
    let (began, mut violated, mut seconds, mut commits, mut faults) = (Instant::now(), 0, 0.0, 0, 0);
    for seed in first..first + count {
        let outcome = run(seed, &options);
        (seconds, commits, faults) =
            (seconds + outcome.virtual_seconds, commits + outcome.commits, faults + outcome.faults);
        if let Some(violation) = outcome.violation {
            violated += 1;
            println!("seed {seed}: {violation}");
            if count == 1 || (sabotage.is_some() && violated == 1) {
                outcome.trace.iter().for_each(|line| println!("  {line}"));
            }
        }
    }
    let wall = began.elapsed().as_secs_f64();
    println!(
        "{count} seeds, {violated} violated, {:.1} virtual hours, {commits} commits, {faults} faults in {wall:.1} s: {:.0} seeds a minute",
        seconds / 3_600.0,
        count as f64 / wall * 60.0
    );
}
