//! Device strings: what they name, what this machine has of it, and opening it.
//!
//! `flex` is any CPU. `wgpu`, `vulkan`, `metal`, `cuda` and `rocm` name a stack, `wgpu:1` the second of its devices; the first is
//! the one to prefer, real GPUs before software ones. Which stacks there are is a matter of cargo features, which devices
//! a matter of the machine: both answers are errors with the way out, never panics.

#[cfg(feature = "cubecl")]
mod accelerator;
#[cfg(feature = "wgpu")]
mod adapters;
#[cfg(feature = "cuda")]
mod cuda;
mod processor;

use burn::tensor::Device;
use engine::{DeviceInfo, EngineError, Precision, PrecisionChoice};

pub(crate) use processor::memory_available_bytes;

/// The software that drives a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stack {
    Flex,
    Wgpu,
    Vulkan,
    Metal,
    Cuda,
    Rocm,
}

impl Stack {
    /// In the order in which devices are listed.
    const ALL: [Self; 6] = [Self::Flex, Self::Wgpu, Self::Vulkan, Self::Metal, Self::Cuda, Self::Rocm];

    /// Also the name of its cargo feature.
    fn name(self) -> &'static str {
        match self {
            Self::Flex => "flex",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
        }
    }

    fn is_in_this_build(self) -> bool {
        match self {
            Self::Flex => true,
            Self::Wgpu => cfg!(feature = "wgpu"),
            Self::Vulkan => cfg!(feature = "vulkan"),
            Self::Metal => cfg!(feature = "metal"),
            Self::Cuda => cfg!(feature = "cuda"),
            Self::Rocm => cfg!(feature = "rocm"),
        }
    }

    /// What a machine without any device of this stack lacks.
    fn missing(self) -> &'static str {
        match self {
            Self::Flex => "nothing",
            Self::Wgpu => {
                "no adapter for Vulkan, Metal or DirectX 12: install the GPU's driver (Debian: mesa-vulkan-drivers, which \
                 also brings a software adapter)"
            }
            Self::Vulkan => "no Vulkan adapter: install the GPU's driver (Debian: mesa-vulkan-drivers)",
            Self::Metal => "no Metal adapter: Apple's systems have them",
            Self::Cuda => "no CUDA device: install NVIDIA's driver, and see that `nvidia-smi` lists the GPU",
            Self::Rocm => "no ROCm device: install AMD's driver and HIP, and see that `rocminfo` lists the GPU",
        }
    }
}

/// A parsed device string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DeviceName {
    stack: Stack,
    index: usize,
}

impl DeviceName {
    fn parse(text: &str) -> Result<Self, EngineError> {
        let (name, index) = match text.split_once(':') {
            None => (text, Some(0)),
            Some((name, index)) => (name, index.parse().ok()),
        };
        let stack = Stack::ALL.into_iter().find(|stack| stack.name() == name);
        let (Some(stack), Some(index)) = (stack, index) else {
            let reason = "is not a device: flex, wgpu, vulkan, metal, cuda or rocm, all but the first also with an index, \
                          as in wgpu:1";
            return Err(refusal(text, reason.to_owned()));
        };
        if stack == Stack::Flex && text != "flex" {
            return Err(refusal(text, "the CPU is one device: flex".to_owned()));
        }
        if !stack.is_in_this_build() {
            let built: Vec<&str> = Stack::ALL.into_iter().filter(|s| s.is_in_this_build()).map(Stack::name).collect();
            let reason = format!(
                "is not in this build, which has {}; build it with `--features {}`",
                built.join(", "),
                stack.name()
            );
            return Err(refusal(text, reason));
        }
        Ok(Self { stack, index })
    }
}

/// A device that computes.
#[derive(Debug, Clone)]
pub(crate) struct OpenDevice {
    /// Burn's handle.
    pub(crate) device: Device,
    /// As `beringia devices` shows it; its precision is that of [`PrecisionChoice::Auto`].
    pub(crate) info: DeviceInfo,
    /// Its memory is the host's: the CPU, or a GPU in software.
    pub(crate) is_on_host: bool,
    /// Longest array it can hold in one piece, where there is such a bound.
    pub(crate) buffer_bytes_max: Option<u64>,
    /// Whether products of bf16 matrices can be tried on it.
    pub(crate) multiplies_bf16: bool,
}

impl OpenDevice {
    /// The precision that a choice means here.
    ///
    /// # Errors
    /// bf16 where the device has none.
    pub(crate) fn precision(&self, choice: PrecisionChoice) -> Result<Precision, EngineError> {
        match choice {
            PrecisionChoice::Auto => Ok(self.info.precision),
            PrecisionChoice::Fixed(Precision::Bf16) if !self.multiplies_bf16 => {
                let reason = format!("{} does not multiply bf16 matrices; use --precision f32", self.info.name);
                Err(refusal(&self.info.engine, reason))
            }
            PrecisionChoice::Fixed(precision) => Ok(precision),
        }
    }

    /// Whether calls on it run in this process's own code, where a panic is our bug.
    pub(crate) fn is_flex(&self) -> bool {
        self.info.engine == "flex"
    }
}

/// Opens the device that `name` names.
///
/// # Errors
/// A string that is no device, a stack that is not in this build, a device that this machine does not have or that fails.
pub(crate) fn open(name: &str) -> Result<OpenDevice, EngineError> {
    let DeviceName { stack, index } = DeviceName::parse(name)?;
    match stack {
        Stack::Flex => Ok(processor::open()),
        _ => open_accelerator(stack, index, name),
    }
}

/// Every device of this build on this machine, `flex` first. Devices that cannot be opened are left out: a driver that
/// fails must not hide the others.
pub fn devices() -> Vec<DeviceInfo> {
    let mut found = Vec::new();
    for stack in Stack::ALL.into_iter().filter(|stack| stack.is_in_this_build()) {
        for index in 0..count(stack) {
            let name = if stack == Stack::Flex { "flex".to_owned() } else { format!("{}:{index}", stack.name()) };
            found.extend(open(&name).map(|opened| opened.info));
        }
    }
    found
}

#[cfg(feature = "cubecl")]
fn count(stack: Stack) -> usize {
    if stack == Stack::Flex { 1 } else { accelerator::list(stack).map_or(0, |devices| devices.len()) }
}

#[cfg(not(feature = "cubecl"))]
fn count(stack: Stack) -> usize {
    usize::from(stack == Stack::Flex)
}

#[cfg(feature = "cubecl")]
fn open_accelerator(stack: Stack, index: usize, name: &str) -> Result<OpenDevice, EngineError> {
    let devices = accelerator::list(stack)?;
    match devices.get(index) {
        Some(device) => accelerator::open(stack, index, device),
        None if devices.is_empty() => Err(refusal(name, format!("this machine has {}", stack.missing()))),
        None => {
            let last = devices.len() - 1;
            Err(refusal(name, format!("this machine has {0}:0 to {0}:{last}", stack.name())))
        }
    }
}

#[cfg(not(feature = "cubecl"))]
fn open_accelerator(stack: Stack, _: usize, name: &str) -> Result<OpenDevice, EngineError> {
    Err(refusal(name, format!("this machine has {}", stack.missing())))
}

fn refusal(device: &str, reason: String) -> EngineError {
    EngineError::Device { device: device.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_that_name_no_device_are_refused_with_what_there_is() {
        for (text, expected) in [
            ("gpu", "is not a device: flex, wgpu"),
            ("", "is not a device"),
            ("wgpu:", "is not a device"),
            ("wgpu:-1", "is not a device"),
            ("flex:0", "the CPU is one device: flex"),
        ] {
            let refused = DeviceName::parse(text).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("device {text}: {expected}")), "{refused}");
        }
        for stack in Stack::ALL.into_iter().filter(|stack| !stack.is_in_this_build()) {
            let refused = open(stack.name()).unwrap_err().to_string();
            assert!(refused.contains("is not in this build, which has flex"), "{refused}");
            assert!(refused.ends_with(&format!("`--features {}`", stack.name())), "{refused}");
        }
    }

    #[test]
    fn the_processor_is_listed_first_and_multiplies_both_precisions() {
        let listed = devices();
        assert_eq!(listed[0].engine, "flex");
        assert_eq!(listed[0].precision, Precision::F32);
        assert!(!listed[0].name.is_empty() && listed[0].threads > 0);
        let opened = open("flex").unwrap();
        assert_eq!(opened.precision(PrecisionChoice::Fixed(Precision::Bf16)).unwrap(), Precision::Bf16);
        let without = OpenDevice { multiplies_bf16: false, ..opened };
        let refused = without.precision(PrecisionChoice::Fixed(Precision::Bf16)).unwrap_err();
        assert!(refused.to_string().contains("does not multiply bf16"), "{refused}");
        assert_eq!(without.precision(PrecisionChoice::Auto).unwrap(), Precision::F32);
    }
}
