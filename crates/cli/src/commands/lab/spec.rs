//! What `lab --site` says about one site: `torch:cpu,threads=1,cores=1`.

use crate::engines::check_kind;
use crate::failure::Failure;
use engine::PrecisionChoice;
use std::process::Command;
use std::str::FromStr;

/// Software Vulkan takes its number of threads from here.
const SOFTWARE_VULKAN_THREADS: &str = "LP_NUM_THREADS";

/// Keys behind the engine, with what they take.
const KEYS: &str = "threads=N, cores=LIST, precision=f32|bf16|auto, slowdown=FACTOR";

/// A site that the lab starts.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SiteSpec {
    /// For people; the lab gives it.
    pub(super) name: String,
    /// As `--engine` takes it.
    pub(super) engine: String,
    pub(super) precision: PrecisionChoice,
    /// Host threads; the lab shares the machine's out where none are given.
    pub(super) threads: Option<usize>,
    /// Processors that the site's processes are held to, as `taskset --cpu-list` takes them.
    pub(super) cores: Option<String>,
    /// Artificial factor by which inner steps are slowed down.
    pub(super) slowdown: f64,
}

impl SiteSpec {
    /// A site of the native CPU engine.
    pub(super) fn flex(slowdown: f64) -> Self {
        let (name, engine) = (String::new(), "flex".to_owned());
        Self { name, engine, precision: PrecisionChoice::Auto, threads: None, cores: None, slowdown }
    }

    /// What the command line says of the engine, for `join` and `measure` alike.
    pub(super) fn engine_arguments(&self, threads: usize) -> Vec<String> {
        let arguments = [
            ("--engine", self.engine.clone()),
            ("--precision", self.precision.to_string()),
            ("--threads", threads.to_string()),
            ("--slowdown", self.slowdown.to_string()),
        ];
        arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
    }

    /// `program` with `arguments`, held to the site's processors and threads.
    pub(super) fn command(&self, program: &std::path::Path, threads: usize) -> Command {
        let mut command = match &self.cores {
            None => Command::new(program),
            Some(cores) => {
                let mut command = Command::new("taskset");
                command.args(["--cpu-list", cores]).arg(program);
                command
            }
        };
        command.env(SOFTWARE_VULKAN_THREADS, threads.to_string());
        command
    }

    /// Refuses engines that this build does not have.
    pub(super) fn check(&self) -> Result<(), Failure> {
        check_kind(&self.engine)
    }
}

impl FromStr for SiteSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let engine = parts.next().filter(|engine| !engine.is_empty()).ok_or("an engine is expected, as in flex")?;
        let mut site = Self { engine: engine.to_owned(), ..Self::flex(1.0) };
        let mut list_open = false;
        for part in parts {
            match part.split_once('=') {
                Some((key, value)) => {
                    list_open = key == "cores";
                    site.set(key, value)?;
                }
                // A list of processors has commas of its own.
                None if list_open && part.chars().all(|c| c.is_ascii_digit() || c == '-') => {
                    if let Some(cores) = &mut site.cores {
                        cores.push(',');
                        cores.push_str(part);
                    }
                }
                None => return Err(format!("'{part}' is not KEY=VALUE; keys are {KEYS}")),
            }
        }
        Ok(site)
    }
}

impl SiteSpec {
    fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let refuse = |expected: &str| format!("{key}={value}: {expected} is expected");
        match key {
            "threads" => {
                let threads = value.parse().ok().filter(|threads| (1..=1024).contains(threads));
                self.threads = Some(threads.ok_or_else(|| refuse("1 to 1024"))?);
            }
            "cores" => {
                let plain = !value.is_empty() && value.chars().all(|c| c.is_ascii_digit() || c == '-');
                self.cores = Some(plain.then(|| value.to_owned()).ok_or_else(|| refuse("a list like 0-3,8"))?);
            }
            "precision" => self.precision = value.parse()?,
            "slowdown" => {
                let factor = value.parse().ok().filter(|factor| (1.0..=1e4).contains(factor));
                self.slowdown = factor.ok_or_else(|| refuse("1 to 10000"))?;
            }
            _ => return Err(format!("'{key}' is not a key of a site; keys are {KEYS}")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::Precision;

    #[test]
    fn a_site_is_an_engine_and_what_goes_with_it() {
        assert_eq!("flex".parse::<SiteSpec>().unwrap(), SiteSpec::flex(1.0));
        let site: SiteSpec = "torch:cuda:1,threads=4,cores=0-3,8,precision=bf16,slowdown=2".parse().unwrap();
        assert_eq!((site.engine.as_str(), site.threads, site.slowdown), ("torch:cuda:1", Some(4), 2.0));
        assert_eq!(site.cores.as_deref(), Some("0-3,8"));
        assert_eq!(site.precision, PrecisionChoice::Fixed(Precision::Bf16));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in ["", ",threads=1", "flex,threads=0", "flex,speed=2", "flex,4", "flex,cores=a", "flex,slowdown=0.5"]
        {
            assert!(text.parse::<SiteSpec>().is_err(), "{text}");
        }
    }
}
