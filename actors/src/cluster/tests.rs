use std::time::Instant;

use ingle_protocol::wire::v2::Hardware;

use super::*;

#[tokio::test]
async fn a_certificate_that_is_due_is_renewed_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let signed = OffsetDateTime::now_utc() - Duration::from_secs(21 * 24 * 3600);
    let old = Identity::found_cluster(NodeId([7; 16]), "tower", signed).unwrap();
    old.store(folder.path()).unwrap();
    let certificate = old.certificate.clone();
    let member = MemberHint { node: NodeId([7; 16]), name: "tower".into(), addresses: vec![] };
    let mesh = Mesh::start(MeshOptions {
        identity: old,
        state_dir: folder.path().to_owned(),
        endpoint: bind("127.0.0.1:0".parse().unwrap()).unwrap(),
        facts: NodeFacts {
            member,
            incarnation: 1,
            version: 1,
            software: "test".into(),
            http: String::new(),
            hardware: Hardware::default(),
            models: vec![],
            members: vec![],
        },
        peers: vec![],
        mdns: false,
        workers: Arc::default(),
        share: Arc::new(FileShare::new(folder.path().join("models"), Arc::default())),
        registry: ModelRegistry::open(folder.path()).unwrap(),
    })
    .await
    .unwrap();
    let begun = Instant::now();
    while mesh.identity().certificate == certificate {
        assert!(begun.elapsed() < Duration::from_secs(30), "the certificate is not renewed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let stored = Identity::load(folder.path()).unwrap().unwrap();
    assert_eq!(stored.certificate, mesh.identity().certificate);
    assert_eq!(stored.names, mesh.identity().names);
    assert!(!stored.is_due_for_renewal(OffsetDateTime::now_utc()));
    stored.verify().unwrap();
    mesh.stop("the test is over").await;
}
