//! What is compared: named settings of Beringia, and the peers' scripts with their arguments. Data, not code.

use std::fmt::Write;

/// Inner steps between two merges, where a system has rounds.
const INNER_STEPS: u64 = 20;

/// Samples of both sites in [`INNER_STEPS`] steps: what hivemind counts instead of steps.
const HIVEMIND_TARGET_SAMPLES: u64 = INNER_STEPS * crate::wan::work::BATCH_SAMPLES;

/// Codecs of Beringia's `streaming`.
const CODECS: [&str; 6] = ["f32", "bf16", "int8", "e3m0", "mxfp4", "sparse"];

/// One system under measurement.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct System {
    /// As `--systems` takes it and tables show it.
    pub(crate) name: String,
    /// What runs it.
    pub(crate) kind: Kind,
    /// Steps between two merges: 1 where every step merges.
    pub(crate) steps_per_round: u64,
}

/// Who made it, and how it is started.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// Settings for `beringia init --set`.
    Beringia(Vec<String>),
    /// A script of the peers' folder.
    Peer(Peer),
}

/// A script of the peers' folder, and what it needs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Peer {
    /// File in the folder.
    pub(crate) script: &'static str,
    /// Arguments beside size, steps, rank and seed.
    pub(crate) arguments: Vec<String>,
    /// Which interpreter has what it imports.
    pub(crate) python: Python,
}

/// Interpreters of the peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Python {
    /// Has PyTorch.
    Torch,
    /// Has PyTorch and torchft.
    Torchft,
    /// Has PyTorch and hivemind.
    Hivemind,
}

impl System {
    /// Of Beringia, from settings in words: `sync.strategy=diloco sync.inner_steps=20`.
    fn beringia(name: &str, settings: &str) -> Self {
        let settings: Vec<String> = settings.split_whitespace().map(str::to_owned).collect();
        let steps_per_round = steps_per_round(&settings);
        Self { name: name.to_owned(), kind: Kind::Beringia(settings), steps_per_round }
    }

    fn peer(name: &str, script: &'static str, python: Python, arguments: &str, steps_per_round: u64) -> Self {
        let arguments = arguments.split_whitespace().map(str::to_owned).collect();
        Self { name: name.to_owned(), kind: Kind::Peer(Peer { script, arguments, python }), steps_per_round }
    }

    /// Settings or arguments in words, for the record.
    pub(crate) fn settings(&self) -> &[String] {
        match &self.kind {
            Kind::Beringia(settings) => settings,
            Kind::Peer(peer) => &peer.arguments,
        }
    }
}

/// What `run.toml` makes of the settings: every step merges unless the strategy has rounds.
fn steps_per_round(settings: &[String]) -> u64 {
    let value = |key: &str| settings.iter().rev().find_map(|setting| setting.strip_prefix(key)?.strip_prefix('='));
    if value("sync.strategy") == Some("synchronous") {
        return 1;
    }
    value("sync.inner_steps").and_then(|steps| steps.parse().ok()).unwrap_or(INNER_STEPS)
}

/// All that are known without `--define`.
pub(crate) fn built_in() -> Vec<System> {
    let rounds = format!("sync.inner_steps={INNER_STEPS}");
    let mut systems = vec![
        System::beringia("synchronous", "sync.strategy=synchronous"),
        System::beringia("diloco", &format!("sync.strategy=diloco {rounds}")),
    ];
    for codec in CODECS {
        let settings = format!(
            "sync.strategy=streaming {rounds} sync.fragments=2 sync.overlap_steps=9 sync.mixing=0.5 sync.codec={codec}"
        );
        systems.push(System::beringia(&format!("streaming-{codec}"), &settings));
    }
    // 48 MB a site sends in 1,000 steps of the 5M model; docs/log.md has the choice of H and rank.
    systems.push(System::beringia(
        "streaming-lowrank",
        "sync.strategy=streaming sync.inner_steps=4 sync.overlap_steps=1 sync.codec=lowrank sync.rank=13",
    ));
    let torch = |name, arguments, steps| System::peer(name, "train.py", Python::Torch, arguments, steps);
    let torchft = |name, arguments: &str| {
        System::peer(name, "train.py", Python::Torchft, &format!("{arguments} --H {INNER_STEPS}"), INNER_STEPS)
    };
    let hivemind = |name, mode: &str| {
        let arguments = format!("--mode {mode} --target {HIVEMIND_TARGET_SAMPLES}");
        System::peer(name, "hmtrain.py", Python::Hivemind, &arguments, INNER_STEPS)
    };
    systems.extend([
        torch("ddp", "--mode ddp", 1),
        torch("ddp-bf16", "--mode ddp --bf16comp 1", 1),
        torchft("torchft-localsgd", "--mode local"),
        torchft("torchft-diloco", "--mode diloco --frags 1"),
        torchft("torchft-streaming", "--mode diloco --frags 2 --delay 9"),
        hivemind("hivemind-local", "local"),
        hivemind("hivemind-sync", "sync"),
    ]);
    systems
}

/// The systems that were asked for, in that order. `defined` are `NAME: SETTING SETTING`, and may replace built-in ones;
/// `asked` may end in `*`.
///
/// # Errors
/// A definition without a name, or a name that is not known.
pub(crate) fn choose(asked: &[String], defined: &[String]) -> Result<Vec<System>, String> {
    let mut known = built_in();
    for definition in defined {
        let (name, settings) = definition.split_once(':').ok_or_else(|| {
            format!("--define {definition}\nhint: --define 'NAME: sync.strategy=streaming sync.codec=int8'")
        })?;
        let system = System::beringia(name.trim(), settings);
        match known.iter_mut().find(|old| old.name == system.name) {
            Some(old) => *old = system,
            None => known.push(system),
        }
    }
    let mut chosen: Vec<System> = Vec::new();
    for name in asked {
        let is_meant = |system: &&System| match name.strip_suffix('*') {
            Some(start) => system.name.starts_with(start),
            None => system.name == *name,
        };
        let before = chosen.len();
        for system in known.iter().filter(is_meant) {
            if !chosen.contains(system) {
                chosen.push(system.clone());
            }
        }
        if before == chosen.len() && !known.iter().any(|system| is_meant(&system)) {
            return Err(unknown(name, &known));
        }
    }
    Ok(chosen)
}

fn unknown(name: &str, known: &[System]) -> String {
    let mut text = format!("no system '{name}'\nhint: one of");
    for system in known {
        // Writing to a string cannot fail.
        let _ = write!(text, " {}", system.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(systems: &[System]) -> Vec<&str> {
        systems.iter().map(|system| system.name.as_str()).collect()
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn systems_are_chosen_by_name_and_by_beginning() {
        let chosen = choose(&strings(&["ddp", "torchft-*", "ddp"]), &[]).unwrap();
        assert_eq!(names(&chosen), ["ddp", "torchft-localsgd", "torchft-diloco", "torchft-streaming"]);
        assert_eq!(chosen.iter().map(|system| system.steps_per_round).collect::<Vec<_>>(), [1, 20, 20, 20]);
        assert!(choose(&strings(&["dpd"]), &[]).unwrap_err().contains("hint: one of synchronous diloco"));
    }

    #[test]
    fn a_definition_adds_or_replaces() {
        let defined = strings(&["mine: sync.inner_steps=50 sync.codec=int8", "diloco: sync.inner_steps=100"]);
        let chosen = choose(&strings(&["mine", "diloco", "synchronous"]), &defined).unwrap();
        assert_eq!(chosen.iter().map(|system| system.steps_per_round).collect::<Vec<_>>(), [50, 100, 1]);
        assert_eq!(chosen[0].settings(), ["sync.inner_steps=50", "sync.codec=int8"]);
        assert!(choose(&[], &strings(&["no colon"])).is_err());
    }

    #[test]
    fn names_are_unique() {
        let mut all: Vec<String> = built_in().into_iter().map(|system| system.name).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), built_in().len());
    }
}
