//! Gbit/s that a link needs for a wanted utilisation, as published: arXiv 2501.18512, table 4.
//!
//! A simulation of two sites at 60 % model FLOP utilisation, 16-bit values but where FP4 is said, H = 100, fragments of 3
//! layers. A reduction is hidden behind the backward pass of its step, where overlap is said behind more steps.

/// Utilisations of the table's columns.
pub(super) const WANTED: [f64; 5] = [0.50, 0.80, 0.90, 0.95, 0.99];

/// One row: model, method, Gbit/s for each of [`WANTED`].
pub(super) type Row = (&'static str, &'static str, [f64; 5]);

/// The table.
pub(super) const TABLE: [Row; 15] = [
    ("1B", "Data-Parallel", [86.8, 152.6, 184.2, 222.3, 569.0]),
    ("1B", "DiLoCo", [1.4, 6.2, 13.3, 23.3, 86.8]),
    ("1B", "Streaming DiLoCo", [1.4, 5.2, 9.1, 16.0, 28.1]),
    ("1B", "Streaming DiLoCo overlap", [1.4, 4.3, 6.2, 9.1, 11.0]),
    ("1B", "Streaming DiLoCo overlap FP4", [0.4, 0.9, 1.7, 2.0, 3.0]),
    ("10B", "Data-Parallel", [104.8, 222.3, 222.3, 268.3, 471.5]),
    ("10B", "DiLoCo", [1.7, 7.5, 16.0, 33.9, 104.8]),
    ("10B", "Streaming DiLoCo", [1.7, 5.2, 9.1, 13.3, 19.3]),
    ("10B", "Streaming DiLoCo overlap", [1.7, 3.6, 5.2, 6.2, 7.5]),
    ("10B", "Streaming DiLoCo overlap FP4", [0.4, 0.9, 1.4, 1.4, 1.7]),
    ("100B", "Data-Parallel", [184.2, 323.8, 390.7, 390.7, 471.5]),
    ("100B", "DiLoCo", [3.0, 11.0, 23.3, 49.4, 184.2]),
    ("100B", "Streaming DiLoCo", [2.4, 6.2, 9.1, 11.0, 19.3]),
    ("100B", "Streaming DiLoCo overlap", [1.7, 3.6, 4.3, 5.2, 5.2]),
    ("100B", "Streaming DiLoCo overlap FP4", [0.5, 0.9, 1.1, 1.1, 1.4]),
];

/// The published row of a model and method.
pub(super) fn row(model: &str, method: &str) -> Option<[f64; 5]> {
    TABLE.iter().find(|row| (row.0, row.1) == (model, method)).map(|row| row.2)
}

/// Rates that are tried: the table's lie so far apart, 12.25 a decade. Number 0 is 0.1 Gbit/s, number 49 is 1000.
pub(super) fn gigabits(index: i32) -> f64 {
    10_f64.powf(-1.0 + 4.0 * f64::from(index) / 49.0)
}

/// The number of the rate nearest to that many Gbit/s.
pub(super) fn index_of(gigabits: f64) -> i32 {
    ((gigabits.log10() + 1.0) * 49.0 / 4.0).round() as i32
}

/// Largest quotient of a rate by a printed one that stands for it: the table prints one digit after the point, and its 0.5 is 0.543.
const SAME_MAX: f64 = 1.09;

/// Whether a rate is at or below a printed one.
pub(super) fn is_within(found_gigabits: f64, published_gigabits: f64) -> bool {
    found_gigabits <= SAME_MAX * published_gigabits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_lie_where_the_table_has_them() {
        assert!((gigabits(0) - 0.1).abs() < 1e-12 && (gigabits(49) - 1000.0).abs() < 1e-9);
        for (model, method, rates) in TABLE {
            // Above 1 Gbit/s the printed digits tell the rate within 5 %, below within 12 %.
            for rate in rates {
                let quotient = gigabits(index_of(rate)) / rate;
                assert!(((1.0 / 1.12)..SAME_MAX).contains(&quotient), "{model} {method} {rate}: {quotient}");
            }
            assert!(rates.is_sorted(), "{model} {method}");
        }
    }

    #[test]
    fn a_rate_is_compared_with_what_was_printed() {
        assert!(is_within(gigabits(12), 0.9) && !is_within(gigabits(13), 0.9));
        assert_eq!(row("10B", "DiLoCo").unwrap()[0], 1.7);
        assert_eq!(row("10B", "none"), None);
    }
}
