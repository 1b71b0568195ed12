//! What a run will do, before anybody reserves a machine: time of a step, memory of a device, use of the links between sites.
//!
//! Everything here is arithmetic on arguments: texts of TOML and CSV in, plain types out. The path of a prediction is
//! [`catalogue`] (what a device can do) to [`model`] (one step inside a site) to [`wan`] (what the links between sites leave of it);
//! [`predict`] does it for a table of layouts, [`search`] looks for the best for the sites of a [`cluster`], and [`fit`] makes the few fitted constants of
//! [`model::constants`] again from measured runs. `docs/planner.md` has the formulas, their sources and the errors.
//!
//! What it is not: a simulator of single messages. It knows means, not the tail of one bad day; no failures, no stragglers but those
//! that the layout itself makes.

pub mod catalogue;
pub mod cluster;
pub mod csv;
pub mod fit;
pub mod model;
pub mod models;
pub mod picture;
pub mod predict;
pub mod search;
pub mod units;
pub mod wan;
pub mod what_if;

pub use catalogue::{Catalogue, CatalogueError, Device, Fp8Scale};
pub use model::{Case, ModelError, Prediction};
