//! One file a command: its arguments, which are its help, and what it does with them.

pub(crate) mod devices;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod init;
pub(crate) mod join;
pub(crate) mod lab;
pub(crate) mod logits;
pub(crate) mod measure;
pub(crate) mod members;
pub(crate) mod plan;
pub(crate) mod predict;
pub(crate) mod sample;
pub(crate) mod serve;
pub(crate) mod simulate;
pub(crate) mod status;
pub(crate) mod train;
