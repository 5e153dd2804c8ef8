//! What the structs of the ABI look like here, compared with `tests/c/layout.def`, which C and C++ compilers check.

use std::{fmt::Write as _, mem::offset_of};

use crate::{
    engine::kvt_completion_t,
    layout::{kvt_component_t, kvt_entry_t, kvt_layout_t, kvt_slice_t, kvt_text_t},
    memory::{kvt_block_t, kvt_range_t},
    transfer::{
        kvt_items_t, kvt_outcome_t, kvt_receive_request_t, kvt_send_request_t, kvt_source_t,
    },
};

fn size_of_field<T, F>(_: impl Fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// The lines of one struct. The pattern makes sure that no field is forgotten.
macro_rules! shape {
    ($out:ident, $name:ident { $($field:ident),+ $(,)? }) => {{
        let _ = |it: &$name| { let $name { $($field: _),+ } = it; };
        let (size, align) = (size_of::<$name>(), align_of::<$name>());
        writeln!($out, "KVT_STRUCT({}, {size}, {align})", stringify!($name)).expect("a text grows");
        $(
            let offset = offset_of!($name, $field);
            let size = size_of_field(|it: &$name| &it.$field);
            let (name, field) = (stringify!($name), stringify!($field));
            writeln!($out, "KVT_FIELD({name}, {field}, {offset}, {size})").expect("a text grows");
        )+
    }};
}

/// What describes memory.
fn layouts(out: &mut String) {
    shape!(out, kvt_text_t { data, len });
    shape!(
        out,
        kvt_entry_t {
            address,
            len,
            item_len,
            layer_id,
            memory,
            device
        }
    );
    shape!(
        out,
        kvt_slice_t {
            dim,
            rows,
            groups,
            groups_len
        }
    );
    shape!(
        out,
        kvt_component_t {
            kind,
            draft_entries,
            name,
            entries,
            entries_len,
            slices,
            slices_len,
            page_layout,
        }
    );
    shape!(
        out,
        kvt_layout_t {
            abi_version,
            page_size,
            kv_dtype,
            kv_layout,
            attention,
            total_kv_heads,
            rank_kv_heads,
            tp_rank,
            tp_size,
            pp_rank,
            pp_size,
            first_layer,
            end_layer,
            reserved,
            components,
            components_len,
            compression_ratios,
            compression_ratios_len,
        }
    );
}

/// What describes transfers.
fn transfers(out: &mut String) {
    shape!(out, kvt_range_t { address, len });
    shape!(
        out,
        kvt_block_t {
            source,
            target,
            len
        }
    );
    shape!(
        out,
        kvt_completion_t {
            user_data,
            room,
            id
        }
    );
    shape!(
        out,
        kvt_send_request_t {
            room,
            user_data,
            timeout_ms,
            reserved
        }
    );
    shape!(
        out,
        kvt_source_t {
            peer,
            dummy,
            reserved
        }
    );
    shape!(out, kvt_items_t { items, count });
    shape!(
        out,
        kvt_receive_request_t {
            room,
            user_data,
            timeout_ms,
            receivers_expected,
            prefix_tokens,
            reserved,
            sources,
            sources_len,
            items,
            items_len,
        }
    );
    shape!(
        out,
        kvt_outcome_t {
            status,
            state,
            prefix_tokens,
            is_ready,
            room,
            id,
            bytes,
            batches,
            waited_ns,
            moving_ns,
        }
    );
}

#[test]
fn structs_are_laid_out_as_the_c_side_asserts() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/c/layout.def");
    let mut lines = String::new();
    layouts(&mut lines);
    transfers(&mut lines);
    if std::env::var_os("KVT_WRITE_HEADER").is_some() {
        std::fs::write(path, &lines).expect("the file can be written");
    }
    let committed = std::fs::read_to_string(path).expect("it is committed");
    assert_eq!(
        committed, lines,
        "a struct changed: raise KVT_ABI_VERSION, then run this with KVT_WRITE_HEADER=1"
    );
}
