//! What each accelerator can do, with the source of every figure. Unknown stays unknown: a prediction that needs a missing figure
//! says which one, and a user's own TOML of the same form adds devices or overrides single keys of known ones.

use crate::units::{Bytes, BytesPerSecond, FlopPerSecond, plain};
use base::Hint;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The entries that come with the program.
const BUILT_IN: &str = include_str!("devices.toml");

/// Longest catalogue text that is read, bytes: 10,000 devices of 800 bytes.
const TEXT_BYTES_MAX: usize = 8 << 20;

/// Most devices of one catalogue.
const DEVICES_MAX: usize = 10_000;

/// Least similarity (Jaro-Winkler) at which another name is suggested.
const SUGGESTION_SIMILARITY: f64 = 0.7;

/// Greatest figures of a device that can be meant: some hundred times those of today's, so that a slip of units is not computed with. The least
/// is that over 10^9.
const GREATEST: &[(&str, f64)] = &[
    ("year", 2_200.0),
    ("memory_gib", 1e6),
    ("memory_bandwidth_gb_s", 1e7),
    ("fp32_tflops", 1e6),
    ("tf32_tflops", 1e6),
    ("bf16_tflops", 1e6),
    ("fp16_tflops", 1e6),
    ("fp8_tflops", 1e6),
    ("fp4_tflops", 1e6),
    ("int8_tops", 1e6),
    ("measured_bf16_gemm_tflops", 1e6),
    ("scale_up_gb_s", 1e6),
    ("scale_up_domain_devices", 1e6),
    ("tdp_w", 1e5),
];

/// Least figure over the greatest.
const LEAST: f64 = 1e-9;

/// What scale the hardware's own FP8 matrix product wants, and so what a site can exchange or train with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fp8Scale {
    /// No native FP8.
    None,
    /// One f32 scale per tensor or, in software, per block.
    F32,
    /// f32 scales, but AMD's FNUZ variant of E4M3 (largest value 240): not the others' bytes.
    F32Fnuz,
    /// Powers of two per block of 32 in hardware (OCP MX).
    Ue8m0,
}

/// Number format of a matrix product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// IEEE single.
    Fp32,
    /// NVIDIA's 19-bit format for single-precision inputs.
    Tf32,
    /// bfloat16 with f32 accumulation.
    Bf16,
    /// IEEE half with f32 accumulation.
    Fp16,
    /// FP8 matrix products, bf16 for the rest.
    Fp8,
}

impl Precision {
    /// From the name that a table uses, frameworks' spellings included.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().trim_start_matches("amp_") {
            "fp32" | "f32" | "float32" => Self::Fp32,
            "tf32" => Self::Tf32,
            "bf16" | "bfloat16" => Self::Bf16,
            "fp16" | "f16" | "float16" => Self::Fp16,
            "fp8" => Self::Fp8,
            _ => return None,
        })
    }

    /// Bytes of an activation or weight in transit.
    pub fn bytes(self) -> f64 {
        match self {
            Self::Fp32 | Self::Tf32 => 4.0,
            Self::Bf16 | Self::Fp16 | Self::Fp8 => 2.0,
        }
    }

    /// The catalogue's key of the rate.
    pub fn key(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32_tflops",
            Self::Tf32 => "tf32_tflops",
            Self::Bf16 => "bf16_tflops",
            Self::Fp16 => "fp16_tflops",
            Self::Fp8 => "fp8_tflops",
        }
    }
}

/// Devices whose software and matrix units behave alike; fitted fractions of peak are shared within a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// NVIDIA V100.
    Volta,
    /// NVIDIA A100, A800.
    Ampere,
    /// NVIDIA H100, H800, H20, H200, GH200.
    Hopper,
    /// NVIDIA B200 and its relatives.
    Blackwell,
    /// Cards made for graphics, of any maker: PCIe, no peer-to-peer to count on.
    Graphics,
    /// AMD Instinct.
    Cdna,
    /// Google TPU.
    Tpu,
    /// Huawei Ascend.
    Ascend,
    /// CPU nodes.
    Cpu,
    /// Everything else.
    Other,
}

/// One accelerator (or CPU node), in the makers' own figures. `None` is unknown.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The catalogue's name.
    pub name: String,
    /// Other names it is known by.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Maker.
    pub vendor: String,
    /// gpu, npu, tpu or cpu.
    pub kind: String,
    /// Whose fitted fractions it takes.
    #[serde(default = "other_family")]
    pub family: Family,
    /// shipping, announced or rumoured.
    pub status: String,
    /// Year of first shipment.
    pub year: Option<u16>,
    /// Device memory, GiB.
    pub memory_gib: Option<f64>,
    /// Memory bandwidth, GB/s.
    pub memory_bandwidth_gb_s: Option<f64>,
    /// Dense rate, TFLOP/s, as all that follow.
    pub fp32_tflops: Option<f64>,
    /// TF32.
    pub tf32_tflops: Option<f64>,
    /// bfloat16.
    pub bf16_tflops: Option<f64>,
    /// IEEE half.
    pub fp16_tflops: Option<f64>,
    /// FP8.
    pub fp8_tflops: Option<f64>,
    /// FP4.
    pub fp4_tflops: Option<f64>,
    /// INT8, TOPS.
    pub int8_tops: Option<f64>,
    /// What its FP8 wants as scale.
    pub fp8_scale: Fp8Scale,
    /// A large bf16 matrix product measured by somebody else than the maker, TFLOP/s.
    pub measured_bf16_gemm_tflops: Option<f64>,
    /// Name of the link between devices of one domain.
    pub scale_up_link: Option<String>,
    /// Both directions of all scale-up links of one device, GB/s.
    pub scale_up_gb_s: Option<f64>,
    /// Devices that the scale-up link joins, where it is not one node.
    pub scale_up_domain_devices: Option<u32>,
    /// PCIe generation and width, such as "4.0 x16".
    pub pcie: Option<String>,
    /// Thermal design power, W.
    pub tdp_w: Option<f64>,
    /// The maker's software.
    pub software: Option<String>,
    /// Device string of the PyTorch build that drives it.
    pub pytorch_device: Option<String>,
    /// Where the figures were read.
    pub source: String,
    /// What to beware of.
    pub note: Option<String>,
}

fn other_family() -> Family {
    Family::Other
}

impl Device {
    /// Dense peak rate of a matrix product. A device without a published bf16 rate has none here, even where its fp16 rate is known:
    /// the two differ by up to 12 % where both are published.
    pub fn peak(&self, precision: Precision) -> Option<FlopPerSecond> {
        let tera = match precision {
            Precision::Fp32 => self.fp32_tflops,
            Precision::Tf32 => self.tf32_tflops,
            Precision::Bf16 => self.bf16_tflops,
            Precision::Fp16 => self.fp16_tflops,
            Precision::Fp8 => self.fp8_tflops.filter(|_| self.fp8_scale != Fp8Scale::None),
        };
        tera.map(FlopPerSecond::from_tera)
    }

    /// Device memory.
    pub fn memory(&self) -> Option<Bytes> {
        self.memory_gib.map(Bytes::from_gib)
    }

    /// Memory bandwidth.
    pub fn memory_bandwidth(&self) -> Option<BytesPerSecond> {
        self.memory_bandwidth_gb_s.map(BytesPerSecond::from_gigabytes)
    }

    /// What one device can send over its scale-up links, one direction.
    pub fn scale_up_one_way(&self) -> Option<BytesPerSecond> {
        self.scale_up_gb_s.map(|both| BytesPerSecond::from_gigabytes(both / 2.0))
    }

    /// One direction of its PCIe slot: 16 lanes of 8 GT/s with 128b/130b coding are 15.75 GB/s, and each generation doubles it.
    pub fn pcie_one_way(&self) -> Option<BytesPerSecond> {
        let generation: f64 = self.pcie.as_deref()?.split('.').next()?.parse().ok()?;
        (3.0..=7.0).contains(&generation).then(|| BytesPerSecond::from_gigabytes(15.75 * (generation - 3.0).exp2()))
    }

    fn is_called(&self, name: &str) -> bool {
        let wanted = simplified(name);
        simplified(&self.name) == wanted || self.aliases.iter().any(|alias| simplified(alias) == wanted)
    }
}

/// A name without what people spell differently: case, spaces, hyphens, underscores.
fn simplified(name: &str) -> String {
    name.chars().filter(|letter| letter.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

/// Why a catalogue cannot be used or a device not be found.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogueError {
    /// The text is no catalogue.
    #[error("the device file cannot be read: {0}")]
    Syntax(String),
    /// More than anybody has.
    #[error("the device file is too large: {found} {what}, at most {maximum} are read")]
    TooLarge {
        /// bytes or devices.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many may be.
        maximum: usize,
    },
    /// A rate, size or bandwidth that nothing can have.
    #[error("device \"{device}\": {key} = {} is not a positive number up to {greatest}", plain(*value))]
    Absurd {
        /// Which entry.
        device: String,
        /// Which key of it.
        key: String,
        /// Its value.
        value: f64,
        /// Greatest that can be meant.
        greatest: f64,
    },
    /// An entry without a name, or with one of signs only.
    #[error("the [[device]] at place {place} of the file has no name with a letter or digit")]
    Nameless {
        /// Counted from 1.
        place: usize,
    },
    /// A device that the file describes twice.
    #[error("two [[device]] of the file are \"{0}\"")]
    Again(String),
    /// Two devices of one name.
    #[error("\"{name}\" names two devices, {one} and {other}")]
    Twice {
        /// The name or alias.
        name: String,
        /// One of them.
        one: String,
        /// The other.
        other: String,
    },
    /// No such device.
    #[error("no device is called \"{name}\" in the catalogue")]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// The nearest known one.
        near: Option<String>,
    },
}

impl Hint for CatalogueError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown { near: Some(near), .. } => {
                format!("did you mean \"{near}\"? A device of your own goes into the file given with --devices")
            }
            Self::Unknown { .. } => {
                "`beringia devices --catalogue` lists the known ones; your own goes as a [[device]] into the file given with --devices"
                    .to_owned()
            }
            Self::Nameless { .. } => "give it name = \"...\"".to_owned(),
            Self::Again(name) => format!("keep one [[device]] for \"{name}\", with all that both say"),
            Self::Twice { name, .. } => format!("take \"{name}\" from one of the two"),
            Self::Absurd { key, .. } => format!("give {key} its true value, or leave the key out if it is unknown"),
            Self::Syntax(_) => "compare with an entry of docs/planner.md, \"A device of your own\"".to_owned(),
            Self::TooLarge { .. } => "keep only the devices of your sites".to_owned(),
        })
    }
}

/// All known devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalogue {
    devices: Vec<Device>,
}

impl Catalogue {
    /// The devices that come with the program.
    pub fn built_in() -> Self {
        let devices =
            devices_of(&tables_of(BUILT_IN).unwrap_or_else(|error| unreachable!("our own file parses: {error}")));
        Self { devices: devices.unwrap_or_else(|error| unreachable!("our own file is sound: {error}")) }
    }

    /// These devices with a user's own over them: an entry with a known name or alias overrides the keys it has, any other is new.
    pub fn with_user_file(&self, text: &str) -> Result<Self, CatalogueError> {
        let mut devices = self.devices.clone();
        let mut said = BTreeSet::new();
        for (index, table) in tables_of(text)?.into_iter().enumerate() {
            let name = table.get("name").and_then(toml::Value::as_str).unwrap_or_default().to_owned();
            if simplified(&name).is_empty() {
                return Err(CatalogueError::Nameless { place: index + 1 });
            }
            let known =
                devices.iter().find(|device| device.is_called(&name)).map_or(&name, |device| &device.name).clone();
            if !said.insert(simplified(&known)) {
                return Err(CatalogueError::Again(known));
            }
            match devices.iter_mut().find(|device| device.is_called(&name)) {
                Some(known) => *known = overridden(known, &table)?,
                None => devices.extend(devices_of(&[table])?),
            }
        }
        if devices.len() > DEVICES_MAX {
            return Err(CatalogueError::TooLarge { what: "devices", found: devices.len(), maximum: DEVICES_MAX });
        }
        unambiguous(&devices)?;
        Ok(Self { devices })
    }

    /// The device of this name or alias, whatever its spelling of spaces, hyphens and case.
    pub fn find(&self, name: &str) -> Result<&Device, CatalogueError> {
        self.devices
            .iter()
            .find(|device| device.is_called(name))
            .ok_or_else(|| CatalogueError::Unknown { name: name.chars().take(80).collect(), near: self.nearest(name) })
    }

    /// Every device, in the catalogue's order.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    fn nearest(&self, name: &str) -> Option<String> {
        let wanted: String = simplified(name).chars().take(80).collect();
        self.devices
            .iter()
            .flat_map(|device| std::iter::once(&device.name).chain(&device.aliases))
            .map(|candidate| (strsim::jaro_winkler(&wanted, &simplified(candidate)), candidate))
            .filter(|(similarity, _)| *similarity > SUGGESTION_SIMILARITY)
            .max_by(|left, right| left.0.total_cmp(&right.0))
            .map(|(_, candidate)| candidate.clone())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    device: Vec<toml::Table>,
}

fn tables_of(text: &str) -> Result<Vec<toml::Table>, CatalogueError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(CatalogueError::TooLarge { what: "bytes", found: text.len(), maximum: TEXT_BYTES_MAX });
    }
    let file: File = toml::from_str(text).map_err(|error| CatalogueError::Syntax(error.to_string()))?;
    Ok(file.device)
}

fn devices_of(tables: &[toml::Table]) -> Result<Vec<Device>, CatalogueError> {
    tables.iter().map(device_of).collect()
}

fn device_of(table: &toml::Table) -> Result<Device, CatalogueError> {
    refuse_absurd(table)?;
    let name = table.get("name").map(ToString::to_string).unwrap_or_default();
    table.clone().try_into().map_err(|error: toml::de::Error| CatalogueError::Syntax(format!("device {name}: {error}")))
}

/// The known device as if its entry had said what the user's says.
fn overridden(known: &Device, table: &toml::Table) -> Result<Device, CatalogueError> {
    let built_in = tables_of(BUILT_IN)?;
    let before =
        built_in.into_iter().find(|entry| entry.get("name").and_then(toml::Value::as_str) == Some(&known.name));
    let mut merged = before.unwrap_or_default();
    let kept_name = merged.get("name").cloned();
    merged.extend(table.clone());
    if let Some(name) = kept_name {
        merged.insert("name".to_owned(), name);
    }
    device_of(&merged)
}

/// Refuses a name or alias of two devices: the first would hide the other.
fn unambiguous(devices: &[Device]) -> Result<(), CatalogueError> {
    let mut named: BTreeMap<String, &str> = BTreeMap::new();
    for device in devices {
        for name in std::iter::once(&device.name).chain(&device.aliases) {
            match named.insert(simplified(name), &device.name) {
                Some(other) if other != device.name => {
                    let (one, other) = (other.to_owned(), device.name.clone());
                    return Err(CatalogueError::Twice { name: name.clone(), one, other });
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn refuse_absurd(table: &toml::Table) -> Result<(), CatalogueError> {
    for (key, value) in table {
        let Some(value) = value.as_float().or_else(|| value.as_integer().map(|number| number as f64)) else { continue };
        let known = GREATEST.iter().find(|(name, _)| name == key);
        // A number under any other key is no figure: the entry's own types refuse it.
        let Some((_, greatest)) = known else { continue };
        if !(greatest * LEAST..=*greatest).contains(&value) {
            let device = table.get("name").and_then(toml::Value::as_str).unwrap_or("without a name").to_owned();
            return Err(CatalogueError::Absurd { device, key: key.clone(), value, greatest: *greatest });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The devices that the project promises to know.
    const PROMISED: &[&str] = &[
        "A100",
        "A800",
        "H800",
        "H20",
        "H100",
        "Ascend 910B",
        "Ascend 910C",
        "Ascend 910D",
        "MLU590",
        "MLU690",
        "MTT S5000",
        "MetaX C500",
        "BR104",
        "Hygon K100_AI",
        "DCU K100",
        "BI-V150",
        "MI300X",
        "A64FX",
        "SW26010-Pro",
        "Xeon 8480+",
    ];

    #[test]
    fn every_promised_device_is_there_with_a_source() {
        let catalogue = Catalogue::built_in();
        for name in PROMISED.iter().filter(|name| !name.starts_with("Hygon")) {
            let device = catalogue.find(name).unwrap();
            assert!(!device.source.is_empty(), "{name}");
        }
    }

    #[test]
    fn names_and_aliases_are_unique() {
        let catalogue = Catalogue::built_in();
        let mut seen = std::collections::BTreeSet::new();
        for device in catalogue.devices() {
            let names: std::collections::BTreeSet<_> =
                std::iter::once(&device.name).chain(&device.aliases).map(|name| simplified(name)).collect();
            for name in names {
                assert!(seen.insert(name.clone()), "{name} names two devices");
            }
        }
    }

    #[test]
    fn unknown_stays_unknown() {
        let catalogue = Catalogue::built_in();
        let rumoured = catalogue.find("Ascend 910D").unwrap();
        assert_eq!((rumoured.memory(), rumoured.peak(Precision::Bf16)), (None, None));
        // Its maker prints fp16 only.
        assert_eq!(catalogue.find("MLU590").unwrap().peak(Precision::Bf16), None);
    }

    #[test]
    fn fp8_is_told_apart_by_its_scale() {
        let catalogue = Catalogue::built_in();
        let scale = |name: &str| catalogue.find(name).unwrap().fp8_scale;
        assert_eq!(scale("A100"), Fp8Scale::None);
        assert_eq!(scale("Ascend 910B"), Fp8Scale::None);
        assert_eq!(scale("H20"), Fp8Scale::F32);
        assert_eq!(scale("MI300X"), Fp8Scale::F32Fnuz);
        assert_eq!(scale("B200"), Fp8Scale::Ue8m0);
        assert_eq!(catalogue.find("A100").unwrap().peak(Precision::Fp8), None);
    }

    #[test]
    fn a_misspelt_name_gets_a_suggestion() {
        let error = Catalogue::built_in().find("Ascend 910BB").unwrap_err();
        assert_eq!(error.to_string(), "no device is called \"Ascend 910BB\" in the catalogue");
        assert!(error.hint().unwrap().contains("did you mean \"Ascend 910B"), "{:?}", error.hint());
    }

    #[test]
    fn a_user_overrides_single_keys_and_adds_chips_that_do_not_exist() {
        let text = r#"
            [[device]]
            name = "h20"
            memory_gib = 141
            [[device]]
            name = "Chip of 2030"
            vendor = "us"
            kind = "npu"
            status = "announced"
            bf16_tflops = 9000
            fp8_scale = "ue8m0"
            source = "a wish"
        "#;
        let catalogue = Catalogue::built_in().with_user_file(text).unwrap();
        let h20 = catalogue.find("H20").unwrap();
        assert_eq!((h20.memory_gib, h20.bf16_tflops, h20.name.as_str()), (Some(141.0), Some(148.0), "H20 96GB"));
        assert_eq!(
            catalogue.find("chip-of-2030").unwrap().peak(Precision::Bf16).map(FlopPerSecond::tera),
            Some(9000.0)
        );
    }

    #[test]
    fn absurd_figures_and_unknown_keys_are_refused() {
        let built_in = Catalogue::built_in();
        let negative = "[[device]]\nname = \"A100\"\nmemory_gib = -80";
        let error = built_in.with_user_file(negative).unwrap_err();
        assert_eq!(
            error.to_string(),
            "device \"A100 SXM4 80GB\": memory_gib = -80 is not a positive number up to 1000000"
        );
        for figure in
            ["bf16_tflops = 1e300", "bf16_tflops = 1e-300", "memory_gib = nan", "memory_gib = inf", "tdp_w = 0"]
        {
            let text = format!("[[device]]\nname = \"A100\"\n{figure}");
            assert!(matches!(built_in.with_user_file(&text), Err(CatalogueError::Absurd { .. })), "{figure}");
        }
        let misspelt = "[[device]]\nname = \"A100\"\nmemory_gb = 80";
        assert!(built_in.with_user_file(misspelt).unwrap_err().to_string().contains("memory_gb"));
        assert!(matches!(built_in.with_user_file("[[dev"), Err(CatalogueError::Syntax(_))));
    }

    #[test]
    fn every_figure_of_a_device_has_a_range() {
        let built_in = tables_of(BUILT_IN).unwrap();
        for (key, value) in built_in.iter().flatten() {
            assert!(!(value.is_float() || value.is_integer()) || GREATEST.iter().any(|(name, _)| name == key), "{key}");
        }
    }

    #[test]
    fn names_that_are_none_or_name_two_devices_are_refused() {
        let built_in = Catalogue::built_in();
        let own = "[[device]]\nvendor = \"us\"\nkind = \"npu\"\nstatus = \"announced\"\nfp8_scale = \"none\"\nsource = \"a wish\"\n";
        for name in ["", "name = \"\"", "name = \"+++\""] {
            let error = built_in.with_user_file(&format!("{own}{name}\n")).unwrap_err();
            assert_eq!(error, CatalogueError::Nameless { place: 1 });
        }
        let twice = "[[device]]\nname = \"H20\"\nmemory_gib = 141\n[[device]]\nname = \"h-20\"\ntdp_w = 500\n";
        let error = built_in.with_user_file(twice).unwrap_err();
        assert_eq!(error, CatalogueError::Again("H20 96GB".to_owned()));
        let error = built_in.with_user_file(&format!("{own}name = \"Mine\"\naliases = [\"h100\"]\n")).unwrap_err();
        assert!(matches!(&error, CatalogueError::Twice { other, .. } if other == "Mine"), "{error}");
    }

    #[test]
    fn pcie_doubles_with_each_generation() {
        let catalogue = Catalogue::built_in();
        let rate = |name: &str| catalogue.find(name).unwrap().pcie_one_way().unwrap();
        assert_eq!(rate("V100").0, 15.75e9);
        assert_eq!(rate("H100").0, 63e9);
    }
}
