//! Devices that CubeCL drives: GPUs of every maker, and software that acts as one.
//!
//! A device is opened once in a process and stays open; who asks again gets the same. Listing and opening go one at a
//! time, because Vulkan's loader crashes when several threads make instances at once.

use super::{OpenDevice, Stack, refusal};
use crate::failure;
use burn::tensor::{DType, Device, Tensor};
use cubecl::features::TypeUsage;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind};
use engine::{DeviceInfo, EngineError, Precision};
use std::sync::{Mutex, PoisonError};

#[cfg(feature = "wgpu")]
use super::adapters;
#[cfg(feature = "cuda")]
use super::cuda;

#[cfg(any(feature = "vulkan", feature = "metal"))]
use cubecl::device::WgpuBackend;

/// What was found and opened so far.
struct Registry {
    listed: Vec<(Stack, Vec<cubecl::Device>)>,
    opened: Vec<(cubecl::Device, OpenDevice)>,
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry { listed: Vec::new(), opened: Vec::new() });

/// What a device's driver tells.
#[derive(Default)]
pub(super) struct Description {
    pub(super) name: String,
    pub(super) maker: String,
    pub(super) driver: String,
    pub(super) memory_bytes: Option<u64>,
    pub(super) is_on_host: bool,
}

/// The devices of a stack, best first.
///
/// # Errors
/// The driver fails when asked.
pub(super) fn list(stack: Stack) -> Result<Vec<cubecl::Device>, EngineError> {
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, devices)) = registry.listed.iter().find(|(listed, _)| *listed == stack) {
        return Ok(devices.clone());
    }
    let devices = failure::guarded(stack.name(), || Ok(probe(stack)))?;
    if !devices.is_empty() {
        registry.listed.push((stack, devices.clone()));
    }
    Ok(devices)
}

fn probe(stack: Stack) -> Vec<cubecl::Device> {
    match stack {
        #[cfg(feature = "wgpu")]
        Stack::Wgpu => adapters::preferred(),
        #[cfg(feature = "vulkan")]
        Stack::Vulkan => adapters::of(WgpuBackend::Vulkan),
        #[cfg(feature = "metal")]
        Stack::Metal => adapters::of(WgpuBackend::Metal),
        #[cfg(feature = "cuda")]
        Stack::Cuda => (0..).map_while(|index| cubecl::Device::cuda(index).ok()).collect(),
        #[cfg(feature = "rocm")]
        Stack::Rocm => (0..).map_while(|index| cubecl::Device::rocm(index).ok()).collect(),
        _ => Vec::new(),
    }
}

/// Opens the device that stands at `index` of its stack's list.
///
/// # Errors
/// The driver refuses, or a first small computation fails or is wrong.
pub(super) fn open(stack: Stack, index: usize, device: &cubecl::Device) -> Result<OpenDevice, EngineError> {
    let name = format!("{}:{index}", stack.name());
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, opened)) = registry.opened.iter().find(|(known, _)| known == device) {
        // It may have been opened by another of its names: a Vulkan device is one of `wgpu` and one of `vulkan`.
        let mut again = opened.clone();
        again.info.engine = name;
        return Ok(again);
    }
    let opened = failure::guarded(&name, || {
        let description = describe(device).map_err(|reason| refusal(&name, reason))?;
        let opened = assemble(&name, device, description);
        check(&opened)?;
        Ok(opened)
    })?;
    registry.opened.push((device.clone(), opened.clone()));
    Ok(opened)
}

fn assemble(name: &str, device: &cubecl::Device, description: Description) -> OpenDevice {
    let client = device.client();
    let properties = client.properties();
    let burn_device = Device::from(device.clone());
    let computes_bf16 = burn_device.supports_dtype(DType::BF16);
    let info = DeviceInfo {
        engine: name.to_owned(),
        name: if description.name.is_empty() { properties.identity.name.clone() } else { description.name },
        maker: description.maker,
        driver: description.driver,
        memory_bytes: properties.memory.max_memory().or(description.memory_bytes),
        threads: 1,
        precision: if computes_bf16 { Precision::Bf16 } else { Precision::F32 },
    };
    OpenDevice {
        device: burn_device,
        info,
        is_on_host: description.is_on_host,
        buffer_bytes_max: Some(properties.memory.max_page_size),
        multiplies_bf16: computes_bf16 || has_bf16_matrix_units(properties),
    }
}

/// Vulkan devices often multiply bf16 matrices that they can neither add nor scale.
fn has_bf16_matrix_units(properties: &DeviceProperties) -> bool {
    let bf16 = ElemType::Float(FloatKind::BF16);
    let stored = properties.type_usage(bf16).is_superset(TypeUsage::Buffer | TypeUsage::Conversion);
    stored && properties.features.matmul.cmma.iter().any(|shape| shape.a_type == bf16 && shape.b_type == bf16)
}

/// Compilers, headers and drivers are looked for at the first kernel: run one, and see that it computes.
fn check(opened: &OpenDevice) -> Result<(), EngineError> {
    let values = Tensor::<1>::from_floats([1.0, 2.0, 3.0], &opened.device).mul_scalar(2.0).add_scalar(1.0);
    let name = &opened.info.engine;
    let data = values.try_into_data().map_err(|error| failure::classify(name, &error.to_string()))?;
    match data.try_into_vec::<f32>() {
        Ok(found) if found == [3.0, 5.0, 7.0] => Ok(()),
        found => Err(refusal(name, format!("2·(1, 2, 3) + 1 gave {found:?}"))),
    }
}

fn describe(device: &cubecl::Device) -> Result<Description, String> {
    match device {
        #[cfg(feature = "wgpu")]
        cubecl::Device::Wgpu(adapter) => adapters::describe(adapter),
        #[cfg(feature = "cuda")]
        cubecl::Device::Cuda(_) => cuda::describe(),
        #[cfg(feature = "rocm")]
        cubecl::Device::Hip(_) => Ok(describe_rocm()),
        other => Err(format!("{other:?} belongs to no stack of this build")),
    }
}

#[cfg(feature = "rocm")]
fn describe_rocm() -> Description {
    let version = std::fs::read_to_string("/sys/module/amdgpu/version").unwrap_or_default();
    let driver = format!("amdgpu {}", version.trim()).trim().to_owned();
    Description { maker: "AMD".to_owned(), driver, ..Description::default() }
}
