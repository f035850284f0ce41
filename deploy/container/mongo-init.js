// Run once, when the database folder is empty: a user who may use our database and nothing else.
db.getSiblingDB("core4").createUser({
  user: "core4",
  pwd: process.env.CORE4_DB_PASSWORD,
  roles: [{ role: "readWrite", db: "core4" }],
});
