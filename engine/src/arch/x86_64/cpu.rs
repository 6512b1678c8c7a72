//! What this CPU is called.

use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

/// The brand string, where the CPU has one; read once.
///
/// Source: Intel SDM volume 2, CPUID leaves 0x80000002 to 0x80000004.
pub fn cpu_model() -> Option<&'static str> {
    static MODEL: OnceLock<Option<String>> = OnceLock::new();
    MODEL.get_or_init(read).as_deref()
}

fn read() -> Option<String> {
    if __cpuid(0x8000_0000).eax < 0x8000_0004 {
        return None;
    }
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .map(__cpuid)
        .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|byte| *byte != 0)
        .collect();
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}
