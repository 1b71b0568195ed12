//! What is emulated: models, methods, and how both are scaled down.
//!
//! ```text
//! F = N / n            parameters of the model / of the emulated one
//! T = t / s            seconds of a step of the model / of the emulated one
//! r = R * T / F        bits a second of the emulated link / of the link
//! ```
//! A fragment's bits over what the link carries in a step is then what it is in the model: (b n / P) / (r s) = (b N / P) / (R t).

use super::published;

/// Sites of every run, as published.
pub(super) const SITES: usize = 2;

/// Tokens in a sample; each site has one sample a step.
pub(super) const SEQUENCE_LENGTH: usize = 32;

/// Tokens of the vocabulary: the least that there is text for.
const VOCABULARY: usize = 300;

/// A model of the published table, and the small one that stands for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Model {
    pub(super) name: &'static str,
    /// N.
    pub(super) parameters: f64,
    /// t, as published.
    pub(super) step_seconds: f64,
    /// P: fragments of 3 layers; of 100B 33 instead of 36, for P divides H.
    fragments: u64,
    /// H of rounds with fragments: the multiple of P next to the published 100, below it.
    inner_steps: u64,
    /// Of the small one.
    hidden_size: usize,
    intermediate_size: usize,
}

/// Models of the table; the small ones have about 0.7 million parameters.
pub(super) const MODELS: [Model; 3] = [
    Model {
        name: "1B",
        parameters: 1e9,
        step_seconds: 0.1,
        fragments: 8,
        inner_steps: 96,
        hidden_size: 48,
        intermediate_size: 128,
    },
    Model {
        name: "10B",
        parameters: 1e10,
        step_seconds: 0.8,
        fragments: 16,
        inner_steps: 96,
        hidden_size: 32,
        intermediate_size: 112,
    },
    Model {
        name: "100B",
        parameters: 1e11,
        step_seconds: 4.9,
        fragments: 33,
        inner_steps: 99,
        hidden_size: 24,
        intermediate_size: 72,
    },
];

/// Layers in a fragment, as published.
const FRAGMENT_LAYERS: u64 = 3;

/// A way to keep sites together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Method {
    /// As `--rows` takes it.
    pub(super) name: &'static str,
    /// The published row that it stands beside.
    pub(super) published: &'static str,
    /// Codec of the deltas, and what goes with it.
    codec: &'static str,
    rounds: Rounds,
    /// s: steps of the emulation.
    pub(super) step_seconds: f64,
}

/// When a method synchronises.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rounds {
    /// Every step.
    Steps,
    /// All parameters every 100 steps.
    Whole { overlap_steps: u64 },
    /// A fragment at a time.
    Fragments { overlap_steps: u64 },
}

/// H of rounds without fragments, as published.
const WHOLE_INNER_STEPS: u64 = 100;

/// Steps of the emulation: short, so that a period of 100 takes 10 s; long against what a round costs the machine (encoding,
/// merging and hashing 3 MB: some 5 ms, beside the engine).
const STEP_SECONDS: f64 = 0.1;
/// Where a round is all 100 steps, and so paid rarely.
const WHOLE_STEP_SECONDS: f64 = 0.05;
/// Where that is paid in every step, and nothing hides it.
const SYNCHRONOUS_STEP_SECONDS: f64 = 0.5;

/// All methods. An overlap of one step is the least there is; the published methods without overlap hide a reduction behind a backward
/// pass, two thirds of a step.
pub(super) const METHODS: [Method; 6] = [
    Method {
        name: "synchronous",
        published: "Data-Parallel",
        codec: "bf16",
        rounds: Rounds::Steps,
        step_seconds: SYNCHRONOUS_STEP_SECONDS,
    },
    Method {
        name: "diloco",
        published: "DiLoCo",
        codec: "bf16",
        rounds: Rounds::Whole { overlap_steps: 1 },
        step_seconds: WHOLE_STEP_SECONDS,
    },
    Method {
        name: "streaming",
        published: "Streaming DiLoCo",
        codec: "bf16",
        rounds: Rounds::Fragments { overlap_steps: 1 },
        step_seconds: STEP_SECONDS,
    },
    Method {
        name: "overlap",
        published: "Streaming DiLoCo overlap",
        codec: "bf16",
        rounds: Rounds::Fragments { overlap_steps: 5 },
        step_seconds: STEP_SECONDS,
    },
    Method {
        name: "overlap-e3m0",
        published: "Streaming DiLoCo overlap FP4",
        codec: "e3m0",
        rounds: Rounds::Fragments { overlap_steps: 5 },
        step_seconds: STEP_SECONDS,
    },
    Method {
        name: "overlap-lowrank",
        published: "Streaming DiLoCo overlap FP4",
        codec: "lowrank sync.rank=1",
        rounds: Rounds::Fragments { overlap_steps: 5 },
        step_seconds: STEP_SECONDS,
    },
];

/// One row of the bench.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub(super) model: Model,
    pub(super) method: Method,
}

/// How long a round is and how many are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// S.
    pub(super) round_steps: u64,
    /// Rounds after a change of the link that do not count: those that were on their way, and one more.
    pub(super) settling_rounds: u64,
    /// Steps that are measured: whole rounds, all fragments once.
    pub(super) steps: u64,
}

/// Steps that are measured where every step synchronises: as many seconds as 100 others.
const SYNCHRONOUS_WINDOW_STEPS: u64 = 10;

impl Row {
    /// The published rates.
    pub(super) fn published(&self) -> Option<[f64; 5]> {
        published::row(self.model.name, self.method.published)
    }

    /// Bits a second of the emulated link, where the small model has `parameters`.
    pub(super) fn link_bits_per_second(&self, gigabits: f64, parameters: u64) -> f64 {
        gigabits * 1e9 * self.time_factor() / self.parameter_factor(parameters)
    }

    /// F.
    pub(super) fn parameter_factor(&self, parameters: u64) -> f64 {
        self.model.parameters / parameters as f64
    }

    /// T.
    pub(super) fn time_factor(&self) -> f64 {
        self.model.step_seconds / self.method.step_seconds
    }

    /// What is measured of it.
    pub(super) fn window(&self) -> Window {
        match self.method.rounds {
            Rounds::Steps => Window { round_steps: 1, settling_rounds: 1, steps: SYNCHRONOUS_WINDOW_STEPS },
            Rounds::Whole { overlap_steps } => Self::window_of(WHOLE_INNER_STEPS, overlap_steps, WHOLE_INNER_STEPS),
            Rounds::Fragments { overlap_steps } => {
                let Model { inner_steps, fragments, .. } = self.model;
                Self::window_of(inner_steps / fragments, overlap_steps, inner_steps)
            }
        }
    }

    fn window_of(round_steps: u64, overlap_steps: u64, steps: u64) -> Window {
        Window { round_steps, settling_rounds: 1 + overlap_steps.div_ceil(round_steps), steps }
    }

    /// Settings of the run: the small model, a flat schedule without end, nothing measured or saved on the way.
    pub(super) fn settings(&self) -> Vec<String> {
        let Model { fragments, inner_steps, hidden_size, intermediate_size, .. } = self.model;
        let rounds = match self.method.rounds {
            Rounds::Steps => "sync.strategy=synchronous".to_owned(),
            Rounds::Whole { overlap_steps } => format!(
                "sync.strategy=streaming sync.fragments=1 sync.inner_steps={WHOLE_INNER_STEPS} \
                 sync.overlap_steps={overlap_steps}"
            ),
            Rounds::Fragments { overlap_steps } => format!(
                "sync.strategy=streaming sync.fragments={fragments} sync.inner_steps={inner_steps} \
                 sync.overlap_steps={overlap_steps}"
            ),
        };
        let layers = fragments * FRAGMENT_LAYERS;
        format!(
            "{rounds} sync.codec={} sync.sites={SITES} sync.shares=[1.0,1.0] sync.deadline_seconds=600.0 \
             model.hidden_size={hidden_size} model.intermediate_size={intermediate_size} \
             model.num_hidden_layers={layers} model.num_attention_heads=4 model.num_key_value_heads=4 \
             model.max_position_embeddings={SEQUENCE_LENGTH} model.tie_word_embeddings=false \
             data.sequence_length={SEQUENCE_LENGTH} train.batch_samples={SITES} train.micro_batch_samples=1 train.steps=1000000 \
             train.warmup_steps=0 train.learning_rate_final_fraction=1.0 \
             evaluate.every_rounds=1000000000 evaluate.samples_max=1 evaluate.sample_tokens=0 \
             checkpoint.every_rounds=1000000000",
            self.method.codec
        )
        .split(' ')
        .map(str::to_owned)
        .collect()
    }
}

/// Arguments of `init` beside the settings.
pub(super) fn vocabulary() -> [String; 2] {
    ["--vocabulary".to_owned(), VOCABULARY.to_string()]
}

/// Text enough for the vocabulary.
pub(super) fn text() -> String {
    const WORDS: [&str; 12] =
        ["sea", "land", "bridge", "ice", "north", "wind", "herd", "walks", "over", "cold", "under", "the"];
    let word = |at: usize| WORDS[(at * at + at / 7) % WORDS.len()];
    (0..900).map(|line| (0..8).map(|at| word(line * 8 + at)).collect::<Vec<_>>().join(" ") + ".\n").collect()
}

/// The rows that `asked` name: `MODEL`, `METHOD` or `MODEL/METHOD`.
///
/// # Errors
/// A name that is not known.
pub(super) fn choose(asked: &[String]) -> Result<Vec<Row>, String> {
    let all: Vec<Row> = MODELS.iter().flat_map(|model| METHODS.map(|method| Row { model: *model, method })).collect();
    let is_meant = |row: &Row, name: &str| {
        let (model, method) = (row.model.name, row.method.name);
        name == model || name == method || name.split_once('/') == Some((model, method))
    };
    if let Some(unknown) = asked.iter().find(|name| !all.iter().any(|row| is_meant(row, name))) {
        let names = METHODS.map(|method| method.name).join(", ");
        return Err(format!(
            "no row '{unknown}'\nhint: 1B, 10B, 100B, one of {names}, or both as in 1B/{}",
            METHODS[1].name
        ));
    }
    Ok(all.into_iter().filter(|row| asked.is_empty() || asked.iter().any(|name| is_meant(row, name))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str) -> Row {
        choose(&[name.to_owned()]).unwrap()[0]
    }

    #[test]
    fn bits_over_what_a_link_carries_in_a_step_stay_as_they_are() {
        for row in choose(&[]).unwrap() {
            let (n, gigabits) = (700_000, 3.0);
            let small = n as f64 / (row.link_bits_per_second(gigabits, n) * row.method.step_seconds);
            let model = row.model.parameters / (gigabits * 1e9 * row.model.step_seconds);
            assert!((small / model - 1.0).abs() < 1e-12, "{row:?}");
        }
        // 1B in steps of 0.05 s: F = 400, T = 2.
        assert!((row("1B/diloco").link_bits_per_second(1.0, 2_500_000) - 5e6).abs() < 1e-6);
    }

    #[test]
    fn a_window_is_whole_rounds_and_all_fragments() {
        for row in choose(&[]).unwrap() {
            let window = row.window();
            assert_eq!(window.steps % window.round_steps, 0, "{row:?}");
            assert!(row.model.inner_steps.is_multiple_of(row.model.fragments));
            assert!(row.published().is_some(), "{row:?}");
        }
        assert_eq!(row("1B/overlap").window(), Window { round_steps: 12, settling_rounds: 2, steps: 96 });
        assert_eq!(row("100B/overlap").window(), Window { round_steps: 3, settling_rounds: 3, steps: 99 });
    }

    #[test]
    fn rows_are_chosen_by_model_method_or_both() {
        let count = |names: &[&str]| {
            choose(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).map(|rows| rows.len())
        };
        assert_eq!(count(&[]), Ok(18));
        assert_eq!(count(&["1B"]), Ok(6));
        assert_eq!(count(&["overlap", "10B/diloco"]), Ok(4));
        assert!(count(&["2B"]).unwrap_err().contains("no row '2B'\nhint: 1B, 10B, 100B, one of synchronous, "));
        assert!(text().len() > 20_000);
    }
}
