//! The arrows between crates point strictly downward, and only one crate knows Burn.
//!
//! Crates alone do not make layers: without this check the network crate imports the model within a month. The
//! check reads the *declared* dependencies in `cargo metadata`, of every kind: a test that needs a crate of its
//! own floor belongs to a crate above.

use crate::finding::Finding;
use serde::Deserialize;
use std::collections::BTreeSet;

/// Floor of every crate of the workspace; 0 is the ground. ARCHITECTURE.md tells what each crate is for.
const FLOORS: &[(&str, u8)] = &[
    ("base", 0),
    ("formats", 0),
    ("rounds", 1),
    ("planner", 1),
    ("wire", 2),
    ("checkpoint", 2),
    ("data", 2),
    ("telemetry", 2),
    ("objects", 2),
    ("engine", 3),
    ("engine-burn", 3),
    ("engine-torch", 3),
    ("site", 4),
    ("coordinator", 4),
    ("simulator", 4),
    ("cli", 5),
    ("fuzz-bodies", 6),
    ("xtask", 6),
];

/// Arrows allowed within one floor: an engine implements the trait that lies beside it, and the simulator drives the coordinator's shell.
const SAME_FLOOR_ALLOWED: &[(&str, &str)] =
    &[("engine-burn", "engine"), ("engine-torch", "engine"), ("simulator", "coordinator")];

/// Highest floor on which crates only decide: see [`PURE_DEPENDENCIES`].
const PURE_FLOOR_MAX: u8 = 1;

/// Outside crates that a pure crate may use: each computes from its arguments and touches nothing else.
const PURE_DEPENDENCIES: &[&str] = &["blake3", "libm", "serde", "strsim", "thiserror", "toml"];

/// The one crate that may depend on Burn or its kernel compiler.
const BURN_CRATE: &str = "engine-burn";

const REASON_DOWNWARD: &str = "arrows point strictly downward, so that a lower crate can be read, tested and \
                               changed without knowing the ones above";
const REASON_FLOOR: &str = "a crate exists only for a boundary worth enforcing, and the floor says which one";
const REASON_BURN: &str = "Burn changes with every release, and other engines stand beside it: only engine-burn \
                           may notice";
const REASON_PURE: &str = "pure crates run unchanged in the simulator and give equal bits everywhere: no I/O, no \
                           async, no clock, no logging";
const REASON_FOLDER: &str = "the folder's name is the crate's name, so that a reader finds the room";

/// The part of `cargo metadata --no-deps` that the check reads.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    /// `None` for a normal dependency, else `dev` or `build`.
    kind: Option<String>,
}

/// Everything that is wrong with the dependencies between and out of the workspace's crates.
pub(crate) fn check(metadata: &Metadata) -> Vec<Finding> {
    let members: BTreeSet<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    metadata.packages.iter().flat_map(|package| check_package(package, &members)).collect()
}

/// Whether the sources of this crate must be pure as well.
pub(crate) fn is_pure(crate_name: &str) -> bool {
    floor_of(crate_name).is_some_and(|floor| floor <= PURE_FLOOR_MAX)
}

fn floor_of(crate_name: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == crate_name).map(|(_, floor)| *floor)
}

fn check_package(package: &Package, members: &BTreeSet<&str>) -> Vec<Finding> {
    let Some(floor) = floor_of(&package.name) else {
        let message = "the crate has no floor: add it to FLOORS in xtask/src/arrows.rs and to ARCHITECTURE.md";
        return vec![Finding::whole(&package.name, message, REASON_FLOOR)];
    };
    let arrows = package.dependencies.iter().filter_map(|dependency| {
        if members.contains(dependency.name.as_str()) {
            check_arrow(&package.name, floor, &dependency.name)
        } else {
            check_outside(&package.name, floor, dependency)
        }
    });
    check_folder(package).into_iter().chain(arrows).collect()
}

fn check_folder(package: &Package) -> Option<Finding> {
    let folder = package.manifest_path.replace('\\', "/");
    let expected = format!("/{}/Cargo.toml", package.name);
    (!folder.ends_with(&expected)).then(|| {
        Finding::whole(&package.name, format!("the manifest lies at {folder}, not in {expected}"), REASON_FOLDER)
    })
}

fn check_arrow(from: &str, from_floor: u8, to: &str) -> Option<Finding> {
    // A target without a floor is reported as a package of its own.
    let to_floor = floor_of(to)?;
    if to_floor < from_floor || SAME_FLOOR_ALLOWED.contains(&(from, to)) {
        return None;
    }
    let direction = if to_floor == from_floor { "on the same floor" } else { "above it" };
    let message = format!(
        "{from} (floor {from_floor}) depends on {to} (floor {to_floor}), which is {direction}: move the shared part down, or the code that needs both up"
    );
    Some(Finding::whole(from, message, REASON_DOWNWARD))
}

fn check_outside(from: &str, floor: u8, dependency: &Dependency) -> Option<Finding> {
    let name = dependency.name.as_str();
    if is_burn(name) && from != BURN_CRATE {
        let message = format!("{from} depends on {name}: go through the Engine trait of crates/engine");
        return Some(Finding::whole(from, message, REASON_BURN));
    }
    // Tests of a pure crate may use what they like; what ships may not.
    let ships = dependency.kind.as_deref() != Some("dev");
    if floor <= PURE_FLOOR_MAX && ships && !PURE_DEPENDENCIES.contains(&name) {
        let message = format!(
            "{from} (floor {floor}) depends on {name}: do that work in a crate above and pass the result in, or, where \
             {name} only computes, add it to PURE_DEPENDENCIES in xtask/src/arrows.rs"
        );
        return Some(Finding::whole(from, message, REASON_PURE));
    }
    None
}

fn is_burn(name: &str) -> bool {
    ["burn", "cubecl"]
        .iter()
        .any(|family| name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_'])))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dependency's name and its kind, as cargo spells it.
    type Arrow = (&'static str, Option<&'static str>);

    /// Metadata as cargo prints it.
    fn metadata(crates: &[(&str, &[Arrow])]) -> Metadata {
        let packages: Vec<_> = crates
            .iter()
            .map(|(name, dependencies)| {
                let dependencies: Vec<_> = dependencies
                    .iter()
                    .map(|(name, kind)| serde_json::json!({ "name": name, "kind": kind, "req": "*" }))
                    .collect();
                let manifest_path = format!("/somewhere/crates/{name}/Cargo.toml");
                serde_json::json!({ "name": name, "manifest_path": manifest_path, "dependencies": dependencies })
            })
            .collect();
        serde_json::from_value(serde_json::json!({ "packages": packages, "version": 1 })).unwrap()
    }

    fn only(findings: Vec<Finding>) -> Finding {
        assert_eq!(findings.len(), 1, "{findings:?}");
        findings.into_iter().next().unwrap()
    }

    #[test]
    fn the_intended_arrows_pass() {
        let fine = metadata(&[
            ("base", &[("serde", None), ("proptest", Some("dev"))]),
            ("rounds", &[("base", None)]),
            ("engine", &[("base", None)]),
            ("engine-burn", &[("engine", None), ("burn", None), ("cubecl-common", None)]),
            ("cli", &[("engine-burn", None), ("rounds", None), ("burnish", None)]),
        ]);
        assert_eq!(check(&fine), []);
    }

    #[test]
    fn an_upward_arrow_is_refused_whatever_its_kind() {
        for kind in [None, Some("dev"), Some("build")] {
            let upward = metadata(&[("base", &[]), ("wire", &[("site", kind)]), ("site", &[])]);
            let finding = only(check(&upward));
            assert!(finding.message.contains("wire (floor 2) depends on site (floor 4), which is above it"));
            assert_eq!(finding.reason, REASON_DOWNWARD);
        }
    }

    #[test]
    fn a_same_floor_arrow_is_refused_but_for_the_named_exception() {
        let finding = only(check(&metadata(&[("data", &[("checkpoint", None)]), ("checkpoint", &[])])));
        assert!(finding.message.contains("on the same floor"), "{finding}");
        // The exception has a direction.
        let backward = metadata(&[("engine", &[("engine-burn", None)]), ("engine-burn", &[])]);
        assert_eq!(only(check(&backward)).place, "engine");
    }

    #[test]
    fn a_crate_without_a_floor_is_refused() {
        let finding = only(check(&metadata(&[("helpers", &[]), ("cli", &[("helpers", None)])])));
        assert_eq!((finding.place.as_str(), finding.reason), ("helpers", REASON_FLOOR));
    }

    #[test]
    fn only_one_crate_may_depend_on_burn() {
        for name in ["burn", "burn-flex", "burn_tensor", "cubecl", "cubecl-wgpu"] {
            let finding = only(check(&metadata(&[("site", &[(name, Some("dev"))])])));
            assert_eq!(finding.reason, REASON_BURN, "{name}");
        }
    }

    #[test]
    fn a_pure_crate_may_not_ship_an_impure_dependency() {
        for name in ["tokio", "tracing", "log", "rand", "memmap2"] {
            let finding = only(check(&metadata(&[("rounds", &[(name, None)])])));
            assert_eq!(finding.reason, REASON_PURE, "{name}");
        }
        assert_eq!(check(&metadata(&[("wire", &[("tokio", None)])])), []);
    }

    #[test]
    fn a_folder_with_another_name_is_refused() {
        let text = r#"{"packages":[{"name":"wire","manifest_path":"/x/crates/network/Cargo.toml","dependencies":[]}]}"#;
        let finding = only(check(&serde_json::from_str(text).unwrap()));
        assert_eq!(finding.reason, REASON_FOLDER);
    }
}
