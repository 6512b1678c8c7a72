//! The byte-level promises that the prost types have to keep.

use firn_proto::{
    CoreEntry, InventoryEntry, Message, PluginsEntry, RegFileEntry, TaskKobjIdsEntry,
};
use firn_proto::{ThreadCoreEntry, VmaEntry, core_entry};

/// Field numbers in the order in which they stand in an encoded message.
fn numbers(mut bytes: &[u8]) -> Vec<u64> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = prost::encoding::decode_varint(&mut bytes).expect("key");
        found.push(key >> 3);
        match key & 7 {
            0 => drop(prost::encoding::decode_varint(&mut bytes).expect("varint")),
            1 => bytes = &bytes[8..],
            2 => {
                let len = prost::encoding::decode_varint(&mut bytes).expect("length");
                bytes = &bytes[usize::try_from(len).expect("small")..];
            }
            5 => bytes = &bytes[4..],
            wire => panic!("wire type {wire}"),
        }
    }
    found
}

#[test]
fn fields_go_out_in_number_order() {
    // The schema declares `tc` (3) after `ti_riscv64` (13).
    let core = CoreEntry {
        mtype: core_entry::March::X8664.into(),
        ti_arm: Some(Default::default()),
        ti_riscv64: Some(Default::default()),
        tc: Some(Default::default()),
        thread_core: Some(ThreadCoreEntry::default()),
        ..Default::default()
    };
    assert_eq!(numbers(&core.encode_to_vec()), [1, 3, 5, 6, 13]);
}

#[test]
fn optional_zero_is_written_and_signed_is_zigzag() {
    let vma = VmaEntry {
        fd: -1,
        madv: Some(0),
        ..Default::default()
    };
    let bytes = vma.encode_to_vec();
    assert_eq!(numbers(&bytes), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(bytes[14..16], [8 << 3, 1], "sint64 -1 is the single byte 1");
}

#[test]
fn repeated_is_unpacked_and_packed_is_accepted() {
    let file = RegFileEntry {
        build_id: vec![1, 2],
        ..Default::default()
    };
    let bytes = file.encode_to_vec();
    assert_eq!(numbers(&bytes).iter().filter(|n| **n == 11).count(), 2);
    let mut packed = RegFileEntry::default().encode_to_vec();
    packed.extend([11 << 3 | 2, 2, 1, 2]);
    assert_eq!(
        RegFileEntry::decode(&packed[..]).expect("packed").build_id,
        [1, 2]
    );
}

#[test]
fn names_may_be_any_bytes() {
    let file = RegFileEntry {
        name: b"/tmp/\xff\xfe".to_vec(),
        ..Default::default()
    };
    assert_eq!(
        RegFileEntry::decode(&file.encode_to_vec()[..]).expect("decodes"),
        file
    );
}

/// The inventory that CRIU 4.2 wrote for a sleeping process, without its run id.
#[test]
fn inventory_has_the_bytes_criu_writes() {
    let inventory = InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        root_ids: Some(TaskKobjIdsEntry {
            vm_id: 1,
            files_id: 1,
            fs_id: 1,
            sighand_id: 1,
            pid_ns_id: Some(1),
            net_ns_id: Some(2),
            ipc_ns_id: Some(3),
            uts_ns_id: Some(4),
            mnt_ns_id: Some(6),
            user_ns_id: Some(7),
            cgroup_ns_id: Some(8),
            time_ns_id: Some(5),
        }),
        ns_per_id: Some(true),
        root_cg_set: Some(1),
        lsmtype: Some(0),
        network_lock_method: Some(0),
        plugins_entry: Some(PluginsEntry::default()),
        ..Default::default()
    };
    let expected = [
        0x08, 0x02, 0x10, 0x01, 0x1a, 0x18, 0x08, 0x01, 0x10, 0x01, 0x18, 0x01, 0x20, 0x01, 0x28,
        0x01, 0x30, 0x02, 0x38, 0x03, 0x40, 0x04, 0x48, 0x06, 0x50, 0x07, 0x58, 0x08, 0x60, 0x05,
        0x20, 0x01, 0x28, 0x01, 0x30, 0x00, 0x58, 0x00, 0x62, 0x00,
    ];
    assert_eq!(inventory.encode_to_vec(), expected);
}
