//! Which graphics cards a machine has, without asking any driver: builds without GPU support know it too.

use std::path::Path;

/// Where Linux lists its cards.
const CARDS: &str = "/sys/class/drm";

/// The graphics cards of this machine, in words; empty where there is none, or none that is known here.
pub fn graphics_cards() -> Vec<String> {
    if cfg!(target_os = "linux") {
        cards_in(Path::new(CARDS))
    } else if cfg!(all(target_os = "macos", target_arch = "aarch64")) {
        // Every such processor has one, and the system its driver.
        vec!["Apple GPU (Metal)".into()]
    } else {
        Vec::new()
    }
}

/// The cards of a folder laid out like `/sys/class/drm`: `card0/device/vendor`, `card0/device/drm/renderD128`. A card
/// without a render node can show pictures and not compute.
fn cards_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names.iter().filter(|name| is_card(name)).filter_map(|name| card(&folder.join(name).join("device"))).collect()
}

/// `card0`, and not the plug `card0-HDMI-A-1`.
fn is_card(name: &str) -> bool {
    name.strip_prefix("card").is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn card(device: &Path) -> Option<String> {
    let read = |name: &str| Some(std::fs::read_to_string(device.join(name)).ok()?.trim().to_ascii_lowercase());
    let maker = match read("vendor")?.as_str() {
        "0x10de" => "NVIDIA",
        "0x1002" => "AMD",
        "0x8086" => "Intel",
        // Virtual machines and boards for pictures only.
        _ => return None,
    };
    let mut nodes = std::fs::read_dir(device.join("drm")).ok()?.flatten();
    nodes.find(|node| node.file_name().to_string_lossy().starts_with("renderD"))?;
    Some(match read("device") {
        Some(id) => format!("{maker} GPU ({})", id.trim_start_matches("0x")),
        None => format!("{maker} GPU"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(folder: &Path, name: &str, vendor: &str, device: &str, renders: bool) {
        let card = folder.join(name).join("device");
        std::fs::create_dir_all(card.join("drm").join(name)).unwrap();
        if renders {
            std::fs::create_dir(card.join("drm/renderD128")).unwrap();
        }
        std::fs::write(card.join("vendor"), format!("{vendor}\n")).unwrap();
        std::fs::write(card.join("device"), format!("{device}\n")).unwrap();
    }

    #[test]
    fn cards_that_compute_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        add(root, "card1", "0x10de", "0x2684", true);
        add(root, "card0", "0x8086", "0x46a6", true);
        add(root, "card2", "0x1002", "0x744c", true);
        // A plug, a virtual card, and a card without a render node.
        add(root, "card0-HDMI-A-1", "0x8086", "0x46a6", true);
        add(root, "card3", "0x1af4", "0x1050", true);
        add(root, "card4", "0x10de", "0x1234", false);
        std::fs::create_dir(root.join("renderD128")).unwrap();
        std::fs::create_dir(root.join("card5")).unwrap();
        std::fs::write(root.join("version"), "drm 1.1.0\n").unwrap();
        assert_eq!(cards_in(root), ["Intel GPU (46a6)", "NVIDIA GPU (2684)", "AMD GPU (744c)"]);
    }

    #[test]
    fn a_machine_without_cards_has_none() {
        let folder = tempfile::tempdir().unwrap();
        assert!(cards_in(folder.path()).is_empty());
        assert!(cards_in(&folder.path().join("none")).is_empty());
    }
}
