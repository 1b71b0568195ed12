//! Adapters: the GPUs that wgpu finds, and software that acts as one.
//!
//! They are asked for through one graphics interface at a time, which every handle names. CubeCL's own choice of an interface
//! also tries OpenGL where Vulkan has no GPU; no kernel of this engine was ever run on it.

use super::accelerator::Description;
use cubecl::device::{WgpuBackend, WgpuDevice, WgpuDeviceKind};
use cubecl::wgpu::wgpu;

/// Interfaces of this system, best first. macOS has Metal alone, where naming it would rule WGSL out.
const INTERFACES: &[WgpuBackend] = if cfg!(target_os = "macos") {
    &[WgpuBackend::Auto]
} else if cfg!(windows) {
    &[WgpuBackend::Vulkan, WgpuBackend::Dx12]
} else {
    &[WgpuBackend::Vulkan]
};

/// Adapters of the first interface that has a GPU, or else of the first that has any.
pub(super) fn preferred() -> Vec<cubecl::Device> {
    let mut software = Vec::new();
    for found in INTERFACES.iter().map(|interface| of(*interface)) {
        match found.first() {
            Some(first) if !is_software(first) => return found,
            Some(_) if software.is_empty() => software = found,
            _ => {}
        }
    }
    software
}

fn is_software(device: &cubecl::Device) -> bool {
    matches!(device, cubecl::Device::Wgpu(WgpuDevice { kind: WgpuDeviceKind::Cpu, .. }))
}

/// Adapters of one interface: GPUs with memory of their own, then those that share the host's, then what stands for a GPU.
///
/// The interface is asked once, because each question opens every driver.
pub(super) fn of(interface: WgpuBackend) -> Vec<cubecl::Device> {
    let backends = backends(interface);
    let descriptor = wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
    let adapters = cubecl::future::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends));
    let types: Vec<wgpu::DeviceType> = adapters.iter().map(|adapter| adapter.get_info().device_type).collect();
    kinds(&types).into_iter().map(|kind| cubecl::Device::Wgpu(WgpuDevice::new(kind).on(interface))).collect()
}

fn backends(interface: WgpuBackend) -> wgpu::Backends {
    match interface {
        WgpuBackend::Vulkan => wgpu::Backends::VULKAN,
        WgpuBackend::Dx12 => wgpu::Backends::DX12,
        _ => wgpu::Backends::METAL,
    }
}

/// CubeCL's names of adapters, best first: it counts those of each type by themselves, in the order in which wgpu lists them.
/// Software has one name, whatever its number.
fn kinds(types: &[wgpu::DeviceType]) -> Vec<WgpuDeviceKind> {
    let count = |wanted| types.iter().filter(|found| **found == wanted).count();
    let numbered = [
        (wgpu::DeviceType::DiscreteGpu, WgpuDeviceKind::DiscreteGpu as fn(usize) -> WgpuDeviceKind),
        (wgpu::DeviceType::IntegratedGpu, WgpuDeviceKind::IntegratedGpu),
        (wgpu::DeviceType::VirtualGpu, WgpuDeviceKind::VirtualGpu),
        (wgpu::DeviceType::Other, WgpuDeviceKind::Other),
    ];
    let gpus = numbered.into_iter().flat_map(|(wanted, kind)| (0..count(wanted)).map(kind));
    let software = (count(wgpu::DeviceType::Cpu) > 0).then_some(WgpuDeviceKind::Cpu);
    gpus.chain(software).collect()
}

/// Opens the adapter, which is what makes its driver tell.
pub(super) fn describe(adapter: &WgpuDevice) -> Result<Description, String> {
    use cubecl::wgpu::{AutoGraphicsApi, RuntimeOptions, try_init_setup};
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
fn amdgpu_memory_bytes(pci_address: &str) -> Option<u64> {
    let file = format!("/sys/bus/pci/devices/{pci_address}/mem_info_vram_total");
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Maker by PCI vendor id, or by Khronos' id above 0xFFFF (`VkVendorId`) where the device is not on a bus.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_counted_by_type_and_real_gpus_come_first() {
        use wgpu::DeviceType::{Cpu, DiscreteGpu, IntegratedGpu};
        let kinds = kinds(&[Cpu, IntegratedGpu, DiscreteGpu, Cpu, DiscreteGpu]);
        let expected = [
            WgpuDeviceKind::DiscreteGpu(0),
            WgpuDeviceKind::DiscreteGpu(1),
            WgpuDeviceKind::IntegratedGpu(0),
            WgpuDeviceKind::Cpu,
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn opengl_is_never_asked() {
        for interface in INTERFACES {
            let backends = backends(*interface);
            assert!((backends & (wgpu::Backends::GL | wgpu::Backends::BROWSER_WEBGPU)).is_empty(), "{backends:?}");
        }
    }
}
