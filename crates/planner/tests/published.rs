//! The shipped constants against published measurements: small tables of facts, each row with its source, under `tests/data`.
//! The larger tables are judged by `cargo xtask fit`; docs/planner.md has their errors.

#![allow(clippy::unwrap_used)]

use planner::Catalogue;
use planner::fit::tables::TABLES;
use planner::fit::{Observation, judge, memory};
use planner::model::constants::FITTED;

const TABLES_HERE: &[(&str, &str)] = &[
    ("megatron_sc21_table1.csv", include_str!("data/megatron_sc21_table1.csv")),
    ("megascale_table2_175B.csv", include_str!("data/megascale_table2_175B.csv")),
    ("korthikanti_table5.csv", include_str!("data/korthikanti_table5.csv")),
];

fn observations<'a>(catalogue: &'a Catalogue, file: &str) -> Vec<Observation<'a>> {
    let (_, text) = TABLES_HERE.iter().find(|(name, _)| *name == file).unwrap();
    let (_, reader) = TABLES.iter().find(|(name, _)| *name == file).unwrap();
    reader(catalogue, text).unwrap()
}

#[test]
fn steps_are_within_five_percent_on_rows_that_did_not_fit_and_better_than_the_naive_model() {
    let catalogue = Catalogue::built_in();
    for (file, _) in TABLES_HERE {
        for error in judge(&observations(&catalogue, file), &FITTED) {
            assert!(error.rows.0 > 0 && error.rows.1 > 0, "{error:?}");
            assert!(error.judged_percent < 5.0 && error.fitted_percent < 5.0, "{error:?}");
            assert!(error.judged_percent < error.naive_percent, "{error:?}");
        }
    }
}

#[test]
fn memory_is_within_five_percent_without_any_fit() {
    let rows = memory::compare(&Catalogue::built_in(), include_str!("data/korthikanti_fig1_memory.csv")).unwrap();
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert!((row.predicted_gib / row.published_gib - 1.0).abs() < 0.05, "{row:?}");
    }
}

#[test]
fn a_layout_measured_twice_is_on_one_side_of_the_split() {
    let catalogue = Catalogue::built_in();
    let rows = observations(&catalogue, "megatron_sc21_table1.csv");
    let twice = observations(&catalogue, "megatron_sc21_table1.csv");
    assert!(rows.iter().zip(&twice).all(|(left, right)| left.fits() == right.fits()));
}
