//! Tables of layouts: defaults, errors with their place, and what must never make a prediction worse.

use super::*;
use crate::model::constants::FITTED;

/// The columns.
const HEADER: &str = "case,device,devices,layers,hidden,ffn,heads,kv_heads,vocab,seq,global_batch,micro_batch,tp,pp,dp,cp,ep,experts,\
                      experts_per_token,zero,recompute,precision,gpus_per_node,interconnect_gbit_s";

fn table(rows: &str) -> Predicted {
    predict_table(&Catalogue::built_in(), &format!("{HEADER}\n{rows}\n")).unwrap()
}

#[test]
fn a_row_of_a_well_known_run_is_plausible() {
    // Llama 3 70B-like on 64 H100.
    let predicted = table("llama,H100,64,80,8192,28672,64,8,128256,8192,128,1,4,4,4,1,1,,,1,none,bf16,8,400");
    let prediction = predicted.rows[0].as_ref().unwrap();
    assert!((0.25..0.6).contains(&prediction.mfu), "{prediction:?}");
    let shares = prediction.compute_share + prediction.communication_share + prediction.bubble_share;
    assert!((shares - 1.0).abs() < 1e-9);
    let mut lines = predicted.csv.lines();
    assert!(lines.next().unwrap().ends_with("bubble_share,error"));
    assert_eq!(lines.next().unwrap().split(',').count(), 24 + 9);
}

#[test]
fn empty_cells_mean_defaults() {
    let short = "device,layers,hidden\nA100,32,4096\n";
    let full = "device,layers,hidden,ffn,heads,kv_heads,vocab,seq,global_batch,micro_batch,tp,pp,dp,zero,recompute,precision,gpus_per_node,interconnect_gbit_s\n\
                A100,32,4096,16384,32,32,51200,2048,1,1,1,1,1,1,none,bf16,8,200\n";
    let one = |text: &str| predict_table(&Catalogue::built_in(), text).unwrap().rows[0].clone().unwrap();
    assert_eq!(one(short), one(full));
}

#[test]
fn errors_name_row_and_column() {
    let first = |rows: &str| table(rows).rows[0].clone().unwrap_err().to_string();
    let row =
        |device: &str, tp: &str, precision: &str| format!("x,{device},,24,2048,,16,,,,,,{tp},,,,,,,,,{precision},,");
    assert_eq!(first(&row("A100", "zwei", "")), "row 1, column tp: \"zwei\" is not a whole number from 1 to 10000");
    assert_eq!(first(&row("A100", "0", "")), "row 1, column tp: \"0\" is not a whole number from 1 to 10000");
    assert_eq!(first(&row("A100", "32", "")), "row 1, column tp: 32 ranks for 16 heads");
    assert_eq!(first(&row("B100X", "", "")), "row 1, column device: no device is called \"B100X\" in the catalogue");
    assert_eq!(first(&row("", "", "")), "row 1, column device: the cell is empty and has no default");
    assert_eq!(first(&row("A100", "", "fp8")), "row 1, column precision: A100 SXM4 80GB has no FP8 products");
    assert_eq!(
        first(&row("A100", "", "int3")),
        "row 1, column precision: \"int3\" is not one of fp32, tf32, bf16, fp16, fp8"
    );
    assert_eq!(
        first("x,A100,8,24,2048,,16,,,,4,,,,,,,,,,,,,"),
        "row 1, column global_batch: \"4\" is not a whole number from dp micro_batch, 8"
    );
    let slip = "x,A100,,24000000,2048,,16,,,,,,,,,,,,,,,,,";
    assert_eq!(first(slip), "row 1, column layers: \"24000000\" is not a whole number from 1 to 10000");
    assert!(first("x,A100,,24,2048,,16,,,,,,,,,,,,,,,,,1e9").contains("from 0.001 to 1000000"));
    assert!(
        first("x,A100,10,24,2048,,16,,,,,,4,,,,,,,,,,,")
            .starts_with("row 1, column devices: \"10\" is not a multiple of tp pp cp, 4")
    );
}

#[test]
fn one_bad_row_does_not_hide_the_others() {
    let predicted = table("a,A100,,24,2048,,16,,,,,,,,,,,,,,,,,\nb,Z9,,24,2048,,16,,,,,,,,,,,,,,,,,");
    assert!(predicted.rows[0].is_ok() && predicted.rows[1].is_err());
    assert_eq!(predicted.errors().count(), 1);
    assert!(predicted.csv.lines().nth(2).unwrap().contains("row 2, column device"));
}

#[test]
fn an_unknown_column_gets_a_suggestion() {
    let error = predict_table(&Catalogue::built_in(), "device,layer,hidden\n").unwrap_err();
    assert_eq!(error.to_string(), "the header has an unknown column \"layer\"");
    assert_eq!(error.hint().as_deref(), Some("did you mean \"layers\"?"));
}

#[test]
fn a_mixed_pipeline_is_as_fast_as_its_slowest_stage() {
    let step = |device: &str| {
        let rows = format!("x,{device},64,32,4096,,32,,,,256,1,4,4,4,,,,,,,bf16,8,200");
        table(&rows).rows[0].clone().unwrap().step
    };
    let (fast, slow, mixed) = (step("H100"), step("A100"), step("A100+H100"));
    assert!(fast < mixed && mixed <= slow, "{fast:?} {mixed:?} {slow:?}");
}

#[test]
fn mixture_of_experts_costs_what_it_activates() {
    let step = |experts: &str| {
        let rows = format!("x,H100,64,32,4096,14336,32,8,,,256,1,1,1,64,,{experts},none,bf16,8,400");
        table(&rows).rows[0].clone().unwrap()
    };
    let (dense, mixture) = (step("1,1,1,1"), step("8,8,2,1"));
    // Twice the active feed-forward, and the exchange of tokens, but far from eight times.
    assert!(mixture.step.0 > 1.3 * dense.step.0 && mixture.step.0 < 4.0 * dense.step.0, "{dense:?} {mixture:?}");
}

#[test]
fn missing_columns_mean_what_authors_of_such_a_row_mostly_mean() {
    let step = |added: &str, cells: &str| {
        let text = format!(
            "device,layers,hidden,ffn,heads,kv_heads,seq,global_batch,tp,pp,dp,zero,precision{added}\n\
             H100,32,4096,14336,32,8,4096,512,{cells}\n"
        );
        predict_table(&Catalogue::built_in(), &text).unwrap().rows[0].clone().unwrap().step
    };
    // FP8 comes with overlapped tensor parallelism, bf16 does not.
    assert_eq!(step("", "4,1,16,1,fp8"), step(",overlap", "4,1,16,1,fp8,full"));
    assert_eq!(step("", "4,1,16,1,bf16"), step(",overlap", "4,1,16,1,bf16,data"));
    // Loss-scaled fp16 is a stack that hides nothing but the gathers of fully sharded parameters.
    assert_eq!(step("", "4,1,16,1,fp16"), step(",stack,overlap", "4,1,16,1,fp16,classic,none"));
    assert_eq!(step("", "1,1,64,3,fp16"), step(",stack,overlap", "1,1,64,3,fp16,classic,data"));
    assert_eq!(step("", "4,4,4,1,bf16"), step(",interleave", "4,4,4,1,bf16,4"));
}

#[test]
fn stages_are_interleaved_as_evenly_as_they_come_out() {
    let chunks = |layers, pp| default_interleave(layers, pp, Stack::Modern);
    // Llama 3 405B, GPT-3, Llama 70B, one layer a stage, more stages than half the layers.
    assert_eq!([chunks(126.0, 16.0), chunks(96.0, 8.0), chunks(80.0, 4.0), chunks(8.0, 8.0)], [4.0, 6.0, 5.0, 1.0]);
    assert_eq!((chunks(32.0, 1.0), default_interleave(96.0, 8.0, Stack::Classic)), (1.0, 1.0));
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    /// A layout that can be: powers of two throughout.
    fn any_layout() -> impl Strategy<Value = (Layout, Transformer)> {
        let degrees = (0u32..4, 0u32..4, 0u32..7, 0u32..2, 0u8..4);
        let sizes = (1u32..17, 5u32..9, 0u32..4, 0u32..5, 0u32..3);
        (degrees, sizes).prop_map(|((tp, pp, dp, cp, zero), (layers, heads, micro, accumulation, recompute))| {
            let power = |exponent: u32| f64::from(1u32 << exponent);
            let recompute = [Recompute::None, Recompute::Selective, Recompute::Full][recompute as usize];
            let shape = Transformer {
                layers: f64::from(layers) * 8.0,
                hidden: power(heads) * 128.0,
                ffn: power(heads) * 512.0,
                heads: power(heads),
                kv_heads: power(heads),
                vocab: 51_200.0,
                seq: 4_096.0,
                experts: 1.0,
                experts_per_token: 1.0,
                gated: false,
            };
            let layout = Layout {
                tp: power(tp),
                pp: power(pp),
                dp: power(dp),
                cp: power(cp),
                ep: 1.0,
                zero,
                micro_batch: power(micro),
                global_batch: power(dp + micro + accumulation),
                interleave: 1.0,
                recompute,
                stack: Stack::Modern,
                overlap: Overlap::Data,
                sequence_parallel: true,
                eager: false,
                launch_blocking: false,
            };
            (layout, shape)
        })
    }

    fn predicted(layout: Layout, shape: Transformer, device: &Device, network: f64) -> Prediction {
        let case = Case {
            shape,
            layout,
            precision: Precision::Bf16,
            devices: vec![device],
            stage_layers: None,
            devices_per_node: 8.0,
            network: BitsPerSecond::from_gigabits(network),
        };
        case.predict_with(&FITTED).unwrap()
    }

    proptest! {
        #[test]
        fn better_hardware_never_takes_longer((layout, shape) in any_layout(), network in 10.0..400.0_f64, more in 1.0..4.0_f64) {
            let catalogue = Catalogue::built_in();
            let device = catalogue.find("A100").unwrap();
            let now = predicted(layout, shape, device, network).step.0;
            prop_assert!(predicted(layout, shape, device, network * more).step.0 <= now * (1.0 + 1e-12));
            let mut better = device.clone();
            better.memory_bandwidth_gb_s = better.memory_bandwidth_gb_s.map(|rate| rate * more);
            prop_assert!(predicted(layout, shape, &better, network).step.0 <= now * (1.0 + 1e-12));
            better.bf16_tflops = better.bf16_tflops.map(|rate| rate * more);
            better.scale_up_gb_s = better.scale_up_gb_s.map(|rate| rate * more);
            prop_assert!(predicted(layout, shape, &better, network).step.0 <= now * (1.0 + 1e-12));
        }

        #[test]
        fn a_prediction_is_sound((layout, shape) in any_layout(), network in 0.1..400.0_f64) {
            let catalogue = Catalogue::built_in();
            let prediction = predicted(layout, shape, catalogue.find("H100").unwrap(), network);
            prop_assert!(prediction.step.0.is_finite() && prediction.step.0 > 0.0);
            prop_assert!(prediction.mfu > 0.0 && prediction.mfu < 1.0);
            for share in [prediction.compute_share, prediction.communication_share, prediction.bubble_share] {
                prop_assert!((-1e-9..=1.0).contains(&share));
            }
            prop_assert!(prediction.memory.total().0 > 0.0);
        }

        #[test]
        fn recomputing_and_sharding_more_never_needs_more_states((layout, shape) in any_layout()) {
            let catalogue = Catalogue::built_in();
            let device = catalogue.find("A100").unwrap();
            let states = |zero: u8| predicted(Layout { zero, ..layout }, shape, device, 200.0).memory.states().0;
            prop_assert!(states(1) <= states(0) && states(2) <= states(1));
            let kept = |recompute| predicted(Layout { recompute, ..layout }, shape, device, 200.0).memory.activations.0;
            prop_assert!(kept(Recompute::Full) <= kept(Recompute::Selective) && kept(Recompute::Selective) <= kept(Recompute::None));
        }

        #[test]
        fn no_table_makes_it_panic(text in ".{0,300}") {
            let _ = predict_table(&Catalogue::built_in(), &text);
            let _ = predict_table(&Catalogue::built_in(), &format!("device,layers,hidden,tp\n{text}"));
        }
    }
}
