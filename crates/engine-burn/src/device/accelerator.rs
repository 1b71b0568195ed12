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
use cubecl::device::{WgpuDevice, WgpuDeviceKind};

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
struct Description {
    name: String,
    maker: String,
    driver: String,
    memory_bytes: Option<u64>,
    is_on_host: bool,
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
        Stack::Wgpu => adapters_of_any_interface(),
        #[cfg(feature = "vulkan")]
        Stack::Vulkan => adapters(WgpuBackend::Vulkan),
        #[cfg(feature = "metal")]
        Stack::Metal => adapters(WgpuBackend::Metal),
        #[cfg(feature = "cuda")]
        Stack::Cuda => (0..).map_while(|index| cubecl::Device::cuda(index).ok()).collect(),
        #[cfg(feature = "rocm")]
        Stack::Rocm => (0..).map_while(|index| cubecl::Device::rocm(index).ok()).collect(),
        _ => Vec::new(),
    }
}

/// Adapters of the graphics interface that wgpu prefers here, asked for once: each question opens every driver, and some write to the
/// terminal.
#[cfg(feature = "wgpu")]
fn adapters_of_any_interface() -> Vec<cubecl::Device> {
    let rank = |device: &cubecl::Device| match device {
        cubecl::Device::Wgpu(WgpuDevice { kind: WgpuDeviceKind::DiscreteGpu(_), .. }) => Some(0),
        cubecl::Device::Wgpu(WgpuDevice { kind: WgpuDeviceKind::IntegratedGpu(_), .. }) => Some(1),
        cubecl::Device::Wgpu(WgpuDevice { kind: WgpuDeviceKind::VirtualGpu(_), .. }) => Some(2),
        cubecl::Device::Wgpu(WgpuDevice { kind: WgpuDeviceKind::Other(_), .. }) => Some(3),
        cubecl::Device::Wgpu(_) => Some(4),
        _ => None,
    };
    let devices = cubecl::Device::enumerate_all().into_iter();
    let mut ranked: Vec<_> = devices.filter_map(|device| Some((rank(&device)?, device))).collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, device)| device).collect()
}

/// Adapters of one graphics interface: GPUs with memory of their own, then those that share the host's, then what stands for a
/// GPU.
#[cfg(any(feature = "vulkan", feature = "metal"))]
fn adapters(backend: WgpuBackend) -> Vec<cubecl::Device> {
    let named = |kind: WgpuDeviceKind| match backend {
        WgpuBackend::Metal => cubecl::Device::metal_msl(kind).ok(),
        _ => cubecl::Device::vulkan(kind).ok(),
    };
    let kinds: [fn(usize) -> WgpuDeviceKind; 4] =
        [WgpuDeviceKind::DiscreteGpu, WgpuDeviceKind::IntegratedGpu, WgpuDeviceKind::VirtualGpu, WgpuDeviceKind::Other];
    let gpus = kinds.into_iter().flat_map(|kind| (0..).map_while(move |index| named(kind(index))));
    gpus.chain(named(WgpuDeviceKind::Cpu)).collect()
}

/// Opens the device that stands at `index` of its stack's list.
///
/// # Errors
/// The driver refuses, or a first small computation fails or is wrong.
pub(super) fn open(stack: Stack, index: usize, device: &cubecl::Device) -> Result<OpenDevice, EngineError> {
    let name = format!("{}:{index}", stack.name());
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, opened)) = registry.opened.iter().find(|(known, _)| known == device) {
        return Ok(opened.clone());
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
        cubecl::Device::Wgpu(adapter) => describe_adapter(adapter),
        #[cfg(feature = "cuda")]
        cubecl::Device::Cuda(_) => describe_cuda(),
        #[cfg(feature = "rocm")]
        cubecl::Device::Hip(_) => Ok(describe_rocm()),
        other => Err(format!("{other:?} belongs to no stack of this build")),
    }
}

#[cfg(feature = "wgpu")]
fn describe_adapter(adapter: &WgpuDevice) -> Result<Description, String> {
    use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, try_init_setup, wgpu};
    let options = RuntimeOptions::try_default().map_err(|error| error.to_string())?;
    let setup = try_init_setup::<AutoGraphicsApi>(adapter, options).map_err(|error| error.to_string())?;
    let info = setup.adapter.get_info();
    let is_on_host = info.device_type == wgpu::DeviceType::Cpu;
    let memory_bytes = match is_on_host {
        true => super::processor::memory_total_bytes(),
        false => amdgpu_memory_bytes(&info.device_pci_bus_id),
    };
    let driver = format!("{:?}, {} {}", info.backend, info.driver, info.driver_info);
    Ok(Description {
        name: info.name,
        maker: maker(info.vendor),
        driver: driver.trim().to_owned(),
        memory_bytes,
        is_on_host,
    })
}

/// Video memory as Linux' `amdgpu` driver tells it; other drivers do not.
#[cfg(feature = "wgpu")]
fn amdgpu_memory_bytes(pci_address: &str) -> Option<u64> {
    let file = format!("/sys/bus/pci/devices/{pci_address}/mem_info_vram_total");
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Maker by PCI vendor id, or by Khronos' id above 0xFFFF (`VkVendorId`) where the device is not on a bus.
#[cfg(feature = "wgpu")]
fn maker(vendor_id: u32) -> String {
    match vendor_id {
        0x1002 | 0x1022 => "AMD",
        0x1010 => "Imagination Technologies",
        0x106B => "Apple",
        0x10DE => "NVIDIA",
        0x13B5 => "Arm",
        0x14E4 => "Broadcom",
        0x1AE0 => "Google",
        0x1ED5 => "Moore Threads",
        0x5143 => "Qualcomm",
        0x8086 => "Intel",
        0x1_0005 => "Mesa",
        other => return format!("PCI vendor {other:#06x}"),
    }
    .to_owned()
}

/// NVRTC reads CUDA's headers when it compiles a kernel; CubeCL looks for them in `CUDA_PATH` and the usual places.
#[cfg(feature = "cuda")]
fn describe_cuda() -> Result<Description, String> {
    let headers = cubecl::cuda::install::cuda_path().map(|path| path.join("include"));
    if !headers.as_ref().is_some_and(|folder| folder.join("cuda_fp16.h").exists()) {
        let searched = headers.map_or(String::new(), |folder| format!(" in {}", folder.display()));
        return Err(format!(
            "CUDA's headers (cuda_fp16.h) were not found{searched}: set CUDA_PATH to a folder that holds include/, that of a \
             toolkit or nvidia/cuda_runtime of Python's nvidia-cuda-runtime package"
        ));
    }
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let is_version = |word: &&str| word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit());
    let driver = text.split_whitespace().find(is_version).map(|version| format!("NVIDIA {version}"));
    Ok(Description { maker: "NVIDIA".to_owned(), driver: driver.unwrap_or_default(), ..Description::default() })
}

#[cfg(feature = "rocm")]
fn describe_rocm() -> Description {
    let version = std::fs::read_to_string("/sys/module/amdgpu/version").unwrap_or_default();
    let driver = format!("amdgpu {}", version.trim()).trim().to_owned();
    Description { maker: "AMD".to_owned(), driver, ..Description::default() }
}
