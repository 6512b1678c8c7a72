//! Shadow stacks as images know them: a dump is edited so that its task had one.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use firn_tests::{Sandbox, Task, isolated, skip};
use serde_json::{Value, json};

const TEST: &str = "an_image_with_a_shadow_stack";
/// Bits of `vma_entry.status`: ordinary private memory without a file, and a shadow stack.
const MEMORY: u64 = 0x201;
const SHSTK: u64 = 0x8000;

/// Decodes an image, changes its first entry, and encodes it again.
fn edit(sandbox: &Sandbox, image: &Path, change: impl FnOnce(&mut Value)) {
    let mut decoded = decode(sandbox, image);
    change(&mut decoded["entries"][0]);
    let json = sandbox.dir().join("edited.json");
    std::fs::write(&json, decoded.to_string()).expect("the scratch directory is writable");
    let words = ["image", "encode", "-o"].map(OsStr::new);
    let files = [image.as_os_str(), json.as_os_str()];
    let encoded = sandbox.firn(words.into_iter().chain(files));
    encoded.expect_success("firn image encode");
}

fn decode(sandbox: &Sandbox, image: &Path) -> Value {
    let decoded = sandbox.firn(["image".as_ref(), "decode".as_ref(), image.as_os_str()]);
    let decoded = decoded.expect_success("firn image decode");
    serde_json::from_str(&decoded.stdout).expect("JSON")
}

/// Says in the image of an address space that its last nameless memory with pages is a shadow stack; returns
/// its addresses.
fn mark_shadow_stack(mm: &mut Value) -> (u64, u64) {
    let vmas = mm["vmas"].as_array_mut().expect("mappings");
    let is_memory =
        |vma: &&mut Value| vma["status"] == MEMORY && vma["flags"] == 0x22 && vma["prot"] == 3;
    let vma = vmas.iter_mut().rfind(is_memory);
    let vma = vma.expect("some memory of the libraries");
    vma["status"] = (MEMORY | SHSTK).into();
    let number = |key: &str| vma[key].as_u64().expect("an address");
    (number("start"), number("end"))
}

/// Where a text is in a plan.
#[track_caller]
fn position(plan: &str, text: &str) -> usize {
    plan.find(text)
        .unwrap_or_else(|| panic!("no {text:?} in\n{plan}"))
}

fn restore_command(images: &Path, option: &str) -> Vec<PathBuf> {
    let words = ["restore", option, "-D"].map(PathBuf::from);
    words.into_iter().chain([images.to_owned()]).collect()
}

/// Nothing is mapped or switched on by ordinary means, and only after all the rest.
fn check_plan(sandbox: &Sandbox, images: &Path, start: u64, end: u64) {
    let plan = sandbox.firn(restore_command(images, "--plan"));
    let plan = plan.expect_success("firn restore --plan").stdout;
    let mapped = position(
        &plan,
        &format!("map_shadow_stack of shadow stack [{start:#x}-{end:#x}"),
    );
    assert!(
        !plan.contains(&format!("mmap of shadow stack [{start:#x}")),
        "{plan}"
    );
    assert!(
        !plan.contains(&format!("pages from [{start:#x}]")),
        "{plan}"
    );
    let small = position(&plan, "setting RLIMIT_STACK for small shadow stacks");
    let on = position(&plan, "switching the shadow stack on");
    let locked = position(&plan, "locking the shadow stack");
    let again = position(&plan, "setting RLIMIT_STACK again");
    assert!(
        mapped < small && small < on && on < locked && locked < again,
        "{plan}"
    );
}

/// What Debian's decoder says is what ours says.
fn check_crit(sandbox: &Sandbox, core: &Path) {
    let mut crit = Command::new("crit");
    let crit = sandbox.run(crit.args(["decode", "-i"]).arg(core));
    let crit: Value = serde_json::from_str(&crit.expect_success("crit").stdout).expect("JSON");
    let cet = |core: &Value| core["entries"][0]["thread_info"]["fpregs"]["xsave"]["cet"].clone();
    // crit 3.17 does not know the message and shows nothing.
    let (theirs, ours) = (cet(&crit), cet(&decode(sandbox, core)));
    assert!(theirs.is_null() || theirs == ours, "{theirs} and {ours}");
    assert_eq!(ours["cet"], 1);
}

fn has_shadow_stacks(sandbox: &Sandbox) -> bool {
    let words = ["check", "--feature", "shadow_stack"];
    sandbox.firn(words).status.success()
}

#[test]
fn an_image_with_a_shadow_stack() {
    isolated(TEST, &["crit"], |sandbox| {
        let (dir, images) = (sandbox.make_dir("work"), sandbox.make_dir("images"));
        let task = Task::spawn(sandbox, &dir, "sleep", ["1000"]);
        task.dump(&images, &[]).expect_success("dump");
        task.wait_until_gone();
        let pid = task.pid();
        let image = |kind: &str| images.join(format!("{kind}-{pid}.img"));

        let mut place = (0, 0);
        edit(sandbox, &image("mm"), |mm| place = mark_shadow_stack(mm));
        let (start, end) = place;
        edit(sandbox, &image("core"), |core| {
            let cet = json!({ "cet": 1, "ssp": start });
            core["thread_info"]["fpregs"]["xsave"]["cet"] = cet;
        });
        let images_text = images.to_str().expect("scratch names are plain");
        let checked = sandbox.firn(["image", "check", images_text]);
        checked.expect_success("firn image check");
        check_crit(sandbox, &image("core"));
        check_plan(sandbox, &images, start, end);

        edit(sandbox, &image("core"), |core| {
            core["thread_info"]["fpregs"]["xsave"]["cet"]["ssp"] = 0x1001.into();
        });
        task.try_restore(&images)
            .expect_refusal(&[&format!("core-{pid}.img"), "shadow stack pointer"]);
        edit(sandbox, &image("core"), |core| {
            core["thread_info"]["fpregs"]["xsave"]["cet"]["ssp"] = start.into();
        });
        match has_shadow_stacks(sandbox) {
            true => skip(TEST, "the refusal where there are none: they are here"),
            false => {
                let refused = task.try_restore(&images);
                refused.expect_refusal(&["uses a shadow stack", &pid.to_string()]);
            }
        }
        sandbox.assert_nothing_left();
    });
}
